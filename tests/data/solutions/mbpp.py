"""Solutions to problems of MBPP's test split, to check the code task's reward with real problems.

A function solves the problem whose tests call it; the numbers are MBPP's.
"""

import re
from collections import Counter
from math import comb, gcd, prod


def remove_Occ(s, ch):  # 11
    first, last = s.find(ch), s.rfind(ch)
    return "".join(c for place, c in enumerate(s) if place not in (first, last))


def sort_matrix(matrix):  # 12
    return sorted(matrix, key=sum)


def count_common(words):  # 13
    return Counter(words).most_common(4)


def text_lowercase_underscore(text):  # 16
    return "Found a match!" if re.search("^[a-z]+_[a-z]+$", text) else "Not matched!"


def square_perimeter(a):  # 17
    return 4 * a


def remove_dirty_chars(string, second):  # 18
    return "".join(c for c in string if c not in second)


def test_duplicate(numbers):  # 19
    return len(set(numbers)) < len(numbers)


def is_woodall(number):  # 20
    return any(n * 2**n - 1 == number for n in range(1, number.bit_length() + 1))


def multiples_of_num(m, n):  # 21
    return list(range(n, m * n + 1, n))


def find_first_duplicate(numbers):  # 22
    seen = set()
    for number in numbers:
        if number in seen:
            return number
        seen.add(number)
    return -1


def binary_to_decimal(binary):  # 24
    return int(str(binary), 2)


def find_Product(arr, n):  # 25
    return prod(set(arr[:n]))


def binomial_Coeff(n, k):  # 28
    return comb(n, k)


def get_Odd_Occurrence(arr, arr_size):  # 29
    return next(value for value, count in Counter(arr[:arr_size]).items() if count % 2)


def count_Substring_With_Equal_Ends(s):  # 30
    return sum(count * (count + 1) // 2 for count in Counter(s).values())


def max_Prime_Factors(n):  # 32
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


def sort_mixed_list(mixed):  # 37
    return sorted(mixed, key=lambda item: (isinstance(item, str), item))


def freq_element(lists):  # 40
    return Counter(item for one in lists for item in one)


def get_gcd(numbers):  # 45
    return gcd(*numbers)


def specified_element(rows, n):  # 49
    return [row[n] for row in rows]


def min_length_list(lists):  # 50
    shortest = min(lists, key=len)
    return len(shortest), shortest


def tn_gp(a, n, r):  # 55
    return a * r ** (n - 1)
