"""Solutions to problems of HumanEval, to check the code task's reward with real problems.

A function solves the problem whose tests call it; names with an underscore are helpers.
"""

import hashlib
import math
from collections import Counter
from itertools import accumulate, combinations, pairwise


def has_close_elements(numbers, threshold):  # HumanEval/0
    return any(b - a < threshold for a, b in pairwise(sorted(numbers)))


def _groups(text):
    """Split parentheses into balanced groups, each with its greatest depth."""
    group, depth, deepest = "", 0, 0
    for character in text.replace(" ", ""):
        group += character
        depth += 1 if character == "(" else -1
        deepest = max(deepest, depth)
        if depth == 0:
            yield group, deepest
            group, deepest = "", 0


def separate_paren_groups(paren_string):  # HumanEval/1
    return [group for group, _ in _groups(paren_string)]


def truncate_number(number):  # HumanEval/2
    return number % 1


def below_zero(operations):  # HumanEval/3
    return any(balance < 0 for balance in accumulate(operations))


def mean_absolute_deviation(numbers):  # HumanEval/4
    mean = sum(numbers) / len(numbers)
    return sum(abs(number - mean) for number in numbers) / len(numbers)


def intersperse(numbers, delimeter):  # HumanEval/5
    return [part for number in numbers for part in (delimeter, number)][1:]


def parse_nested_parens(paren_string):  # HumanEval/6
    return [depth for _, depth in _groups(paren_string)]


def filter_by_substring(strings, substring):  # HumanEval/7
    return [text for text in strings if substring in text]


def sum_product(numbers):  # HumanEval/8
    product = 1
    for number in numbers:
        product *= number
    return sum(numbers), product


def rolling_max(numbers):  # HumanEval/9
    return list(accumulate(numbers, max))


def make_palindrome(string):  # HumanEval/10
    for start in range(len(string)):
        # The problem itself defines the helper.
        if is_palindrome(string[start:]):
            return string + string[:start][::-1]
    return string


def longest(strings):  # HumanEval/12
    return max(strings, key=len, default=None)


def greatest_common_divisor(a, b):  # HumanEval/13
    while b:
        a, b = b, a % b
    return a


def string_sequence(n):  # HumanEval/15
    return " ".join(map(str, range(n + 1)))


def count_distinct_characters(string):  # HumanEval/16
    return len(set(string.lower()))


def find_closest_elements(numbers):  # HumanEval/20
    return min(pairwise(sorted(numbers)), key=lambda pair: pair[1] - pair[0])


def largest_divisor(n):  # HumanEval/24
    return next(d for d in range(n // 2, 0, -1) if n % d == 0)


def find_zero(xs):  # HumanEval/32
    low, high = -1.0, 1.0
    while poly(xs, low) * poly(xs, high) > 0:  # noqa: F821
        low, high = 2 * low, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if poly(xs, low) * poly(xs, middle) > 0:  # noqa: F821
            low = middle
        else:
            high = middle
    return low


def triples_sum_to_zero(l):  # HumanEval/40  # noqa: E741
    return any(sum(triple) == 0 for triple in combinations(l, 3))


def decode_shift(s):  # HumanEval/50
    return "".join(chr((ord(c) - ord("a") - 5) % 26 + ord("a")) for c in s)


def fib(n):  # HumanEval/55
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def rescale_to_unit(numbers):  # HumanEval/21
    low, high = min(numbers), max(numbers)
    return [(number - low) / (high - low) for number in numbers]


def filter_integers(values):  # HumanEval/22
    return [value for value in values if isinstance(value, int)]


def strlen(string):  # HumanEval/23
    return len(string)


def _factors(n):
    k = 2
    while k * k <= n:
        while n % k == 0:
            yield k
            n //= k
        k += 1
    if n > 1:
        yield n


def _is_prime(n):
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def factorize(n):  # HumanEval/25
    return list(_factors(n))


def remove_duplicates(numbers):  # HumanEval/26
    counts = Counter(numbers)
    return [number for number in numbers if counts[number] == 1]


def flip_case(string):  # HumanEval/27
    return string.swapcase()


def concatenate(strings):  # HumanEval/28
    return "".join(strings)


def filter_by_prefix(strings, prefix):  # HumanEval/29
    return [string for string in strings if string.startswith(prefix)]


def get_positive(values):  # HumanEval/30
    return [value for value in values if value > 0]


def is_prime(n):  # HumanEval/31
    return _is_prime(n)


def sort_third(values):  # HumanEval/33
    values = list(values)
    values[::3] = sorted(values[::3])
    return values


def unique(values):  # HumanEval/34
    return sorted(set(values))


def max_element(values):  # HumanEval/35
    return max(values)


def fizz_buzz(n):  # HumanEval/36
    return sum(str(k).count("7") for k in range(n) if k % 11 == 0 or k % 13 == 0)


def sort_even(values):  # HumanEval/37
    values = list(values)
    values[::2] = sorted(values[::2])
    return values


def decode_cyclic(s):  # HumanEval/38
    groups = [s[i : i + 3] for i in range(0, len(s), 3)]
    return "".join(g[-1] + g[:-1] if len(g) == 3 else g for g in groups)


def prime_fib(n):  # HumanEval/39
    a, b = 1, 2
    while True:
        if _is_prime(b):
            n -= 1
            if n == 0:
                return b
        a, b = b, a + b


def car_race_collision(n):  # HumanEval/41
    return n**2


def incr_list(values):  # HumanEval/42
    return [value + 1 for value in values]


def pairs_sum_to_zero(values):  # HumanEval/43
    return any(a + b == 0 for a, b in combinations(values, 2))


def change_base(x, base):  # HumanEval/44
    text = ""
    while x:
        x, digit = divmod(x, base)
        text = str(digit) + text
    return text


def triangle_area(a, h):  # HumanEval/45
    return a * h / 2


def fib4(n):  # HumanEval/46
    values = [0, 0, 2, 0]
    for _ in range(n):
        values = [*values[1:], sum(values)]
    return values[0]


def median(values):  # HumanEval/47
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def is_palindrome(text):  # HumanEval/48
    return text == text[::-1]


def modp(n, p):  # HumanEval/49
    return pow(2, n, p)


def remove_vowels(text):  # HumanEval/51
    return "".join(c for c in text if c.lower() not in "aeiou")


def below_threshold(values, t):  # HumanEval/52
    return all(value < t for value in values)


def add(x, y):  # HumanEval/53
    return x + y


def same_chars(s0, s1):  # HumanEval/54
    return set(s0) == set(s1)


def _balanced(text, opening):
    depth = 0
    for c in text:
        depth += 1 if c == opening else -1
        if depth < 0:
            return False
    return depth == 0


def correct_bracketing(brackets):  # HumanEval/56
    return _balanced(brackets, "<")


def monotonic(values):  # HumanEval/57
    return values in (sorted(values), sorted(values, reverse=True))


def common(a, b):  # HumanEval/58
    return sorted(set(a) & set(b))


def largest_prime_factor(n):  # HumanEval/59
    return max(_factors(n))


def sum_to_n(n):  # HumanEval/60
    return n * (n + 1) // 2


def correct_bracketing(brackets):  # HumanEval/61  # noqa: F811
    return _balanced(brackets, "(")


def derivative(xs):  # HumanEval/62
    return [i * x for i, x in enumerate(xs)][1:]


def fibfib(n):  # HumanEval/63
    a, b, c = 0, 0, 1
    for _ in range(n):
        a, b, c = b, c, a + b + c
    return a


def vowels_count(s):  # HumanEval/64
    s = s.lower()
    return sum(c in "aeiou" for c in s) + s.endswith("y")


def circular_shift(x, shift):  # HumanEval/65
    text = str(x)
    return text[::-1] if shift > len(text) else text[-shift:] + text[:-shift]


def digitSum(s):  # HumanEval/66
    return sum(ord(c) for c in s if c.isupper())


def fruit_distribution(s, n):  # HumanEval/67
    return n - sum(int(word) for word in s.split() if word.isdigit())


def pluck(values):  # HumanEval/68
    even = [(value, i) for i, value in enumerate(values) if value % 2 == 0]
    return list(min(even)) if even else []


def search(values):  # HumanEval/69
    return max((value for value, n in Counter(values).items() if n >= value), default=-1)


def strange_sort_list(values):  # HumanEval/70
    values, found = sorted(values), []
    while values:
        found.append(values.pop(0))
        values.reverse()
        if values:
            found.append(values.pop(0))
        values.reverse()
    return found


def triangle_area(a, b, c):  # HumanEval/71  # noqa: F811
    if 2 * max(a, b, c) >= a + b + c:
        return -1
    s = (a + b + c) / 2
    return round(math.sqrt(s * (s - a) * (s - b) * (s - c)), 2)


def will_it_fly(q, w):  # HumanEval/72
    return q == q[::-1] and sum(q) <= w


def smallest_change(values):  # HumanEval/73
    return sum(a != b for a, b in zip(values, values[::-1], strict=True)) // 2


def total_match(a, b):  # HumanEval/74
    return min(a, b, key=lambda words: sum(map(len, words)))


def is_multiply_prime(n):  # HumanEval/75
    return len(list(_factors(n))) == 3


def is_simple_power(x, n):  # HumanEval/76
    if n == 1:
        return x == 1
    power = 1
    while power < x:
        power *= n
    return power == x


def iscube(a):  # HumanEval/77
    return round(abs(a) ** (1 / 3)) ** 3 == abs(a)


def hex_key(num):  # HumanEval/78
    return sum(c in "2357BD" for c in num)


def decimal_to_binary(decimal):  # HumanEval/79
    return f"db{decimal:b}db"


def is_happy(s):  # HumanEval/80
    return len(s) > 2 and all(len(set(s[i : i + 3])) == 3 for i in range(len(s) - 2))


_GRADES = [(3.7, "A"), (3.3, "A-"), (3.0, "B+"), (2.7, "B"), (2.3, "B-"), (2.0, "C+"), (1.7, "C"),
           (1.3, "C-"), (1.0, "D+"), (0.7, "D"), (0.0, "D-")]  # fmt: skip


def numerical_letter_grade(grades):  # HumanEval/81
    def letter(grade):
        return "A+" if grade == 4 else next((g for low, g in _GRADES if grade > low), "E")

    return list(map(letter, grades))


def prime_length(string):  # HumanEval/82
    return _is_prime(len(string))


def starts_one_ends(n):  # HumanEval/83
    return 1 if n == 1 else 18 * 10 ** (n - 2)


def solve(n):  # HumanEval/84
    return f"{sum(map(int, str(n))):b}"


def add(values):  # HumanEval/85  # noqa: F811
    return sum(value for value in values[1::2] if value % 2 == 0)


def anti_shuffle(s):  # HumanEval/86
    return " ".join("".join(sorted(word)) for word in s.split(" "))


def get_row(rows, x):  # HumanEval/87
    found = [(i, j) for i, row in enumerate(rows) for j, value in enumerate(row) if value == x]
    return sorted(found, key=lambda place: (place[0], -place[1]))


def sort_array(values):  # HumanEval/88
    return sorted(values, reverse=bool(values) and (values[0] + values[-1]) % 2 == 0)


def encrypt(s):  # HumanEval/89
    return "".join(chr((ord(c) - 93) % 26 + 97) if c.islower() else c for c in s)


def next_smallest(values):  # HumanEval/90
    values = sorted(set(values))
    return values[1] if len(values) > 1 else None


def is_bored(s):  # HumanEval/91
    for mark in "?!":
        s = s.replace(mark, ".")
    return sum(part.strip().startswith("I ") for part in s.split("."))


def any_int(x, y, z):  # HumanEval/92
    whole = all(isinstance(n, int) for n in (x, y, z))
    return whole and (x + y == z or x + z == y or y + z == x)


def encode(message):  # HumanEval/93
    def changed(c):
        return chr(ord(c) + 2) if c in "aeiouAEIOU" else c

    return "".join(map(changed, message.swapcase()))


def skjkasdkd(values):  # HumanEval/94
    return sum(map(int, str(max(filter(_is_prime, values)))))


def check_dict_case(values):  # HumanEval/95
    if not values or not all(isinstance(key, str) for key in values):
        return False
    return all(map(str.islower, values)) or all(map(str.isupper, values))


def count_up_to(n):  # HumanEval/96
    return list(filter(_is_prime, range(n)))


def multiply(a, b):  # HumanEval/97
    return abs(a) % 10 * (abs(b) % 10)


def count_upper(s):  # HumanEval/98
    return sum(c in "AEIOU" for c in s[::2])


def closest_integer(value):  # HumanEval/99
    number = float(value)
    return int(math.copysign(math.floor(abs(number) + 0.5), number))


def make_a_pile(n):  # HumanEval/100
    return [n + 2 * i for i in range(n)]


def words_string(s):  # HumanEval/101
    return s.replace(",", " ").split()


def choose_num(x, y):  # HumanEval/102
    return max((n for n in range(x, y + 1) if n % 2 == 0), default=-1)


def rounded_avg(n, m):  # HumanEval/103
    return -1 if n > m else bin(round((n + m) / 2))


def unique_digits(values):  # HumanEval/104
    return sorted(value for value in values if all(int(digit) % 2 for digit in str(value)))


_DIGITS = ["One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]


def by_length(values):  # HumanEval/105
    return [_DIGITS[n - 1] for n in sorted(values, reverse=True) if 1 <= n <= 9]


def f(n):  # HumanEval/106
    return [math.factorial(i) if i % 2 == 0 else i * (i + 1) // 2 for i in range(1, n + 1)]


def even_odd_palindrome(n):  # HumanEval/107
    found = [k for k in range(1, n + 1) if str(k) == str(k)[::-1]]
    return sum(k % 2 == 0 for k in found), sum(k % 2 for k in found)


def _signed_digits(n):
    digits = list(map(int, str(abs(n))))
    return [-digits[0], *digits[1:]] if n < 0 else digits


def count_nums(values):  # HumanEval/108
    return sum(sum(_signed_digits(value)) > 0 for value in values)


def move_one_ball(values):  # HumanEval/109
    return not values or any(values[i:] + values[:i] == sorted(values) for i in range(len(values)))


def exchange(a, b):  # HumanEval/110
    return "YES" if sum(n % 2 == 0 for n in a + b) >= len(a) else "NO"


def histogram(text):  # HumanEval/111
    counts = Counter(text.split())
    return {c: n for c, n in counts.items() if n == max(counts.values())}


def reverse_delete(s, c):  # HumanEval/112
    kept = "".join(x for x in s if x not in c)
    return kept, kept == kept[::-1]


def odd_count(values):  # HumanEval/113
    template = "the number of odd elements in the string i of the input."
    counts = [str(sum(int(digit) % 2 for digit in value)) for value in values]
    return [template.replace("i", n).replace(f"str{n}ng", f"str{n}ng") for n in counts]


def minSubArraySum(values):  # HumanEval/114
    best, run = math.inf, 0
    for value in values:
        run = min(run, 0) + value
        best = min(best, run)
    return best


def max_fill(grid, capacity):  # HumanEval/115
    return sum(-(-sum(row) // capacity) for row in grid)


def sort_array(values):  # HumanEval/116  # noqa: F811
    return sorted(values, key=lambda value: (value.bit_count(), value))


def select_words(s, n):  # HumanEval/117
    return [w for w in s.split() if sum(c.lower() not in "aeiou" for c in w) == n]


def get_closest_vowel(word):  # HumanEval/118
    for i in range(len(word) - 2, 0, -1):
        around = [word[k].lower() in "aeiou" for k in (i - 1, i, i + 1)]
        if around == [False, True, False]:
            return word[i]
    return ""


def match_parens(parts):  # HumanEval/119
    a, b = parts
    return "Yes" if _balanced(a + b, "(") or _balanced(b + a, "(") else "No"


def maximum(values, k):  # HumanEval/120
    return sorted(values)[len(values) - k :]


def solution(values):  # HumanEval/121
    return sum(value for value in values[::2] if value % 2)


def add_elements(values, k):  # HumanEval/122
    return sum(value for value in values[:k] if -99 <= value <= 99)


def get_odd_collatz(n):  # HumanEval/123
    found = {1}
    while n > 1:
        if n % 2:
            found.add(n)
        n = 3 * n + 1 if n % 2 else n // 2
    return sorted(found)


def valid_date(date):  # HumanEval/124
    parts = date.split("-")
    if [len(part) for part in parts] != [2, 2, 4] or not all(map(str.isdigit, parts)):
        return False
    month, day = int(parts[0]), int(parts[1])
    days = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    return 1 <= month <= 12 and 1 <= day <= days[month - 1]


def split_words(text):  # HumanEval/125
    if any(map(str.isspace, text)):
        return text.split()
    if "," in text:
        return text.split(",")
    return sum(c.islower() and (ord(c) - ord("a")) % 2 for c in text)


def is_sorted(values):  # HumanEval/126
    return values == sorted(values) and max(Counter(values).values(), default=0) <= 2


def intersection(a, b):  # HumanEval/127
    length = min(a[1], b[1]) - max(a[0], b[0])
    return "YES" if _is_prime(length) else "NO"


def prod_signs(values):  # HumanEval/128
    if not values:
        return None
    sign = math.prod((value > 0) - (value < 0) for value in values)
    return sign * sum(map(abs, values))


def minPath(grid, k):  # HumanEval/129
    n = len(grid)
    i, j = next((i, j) for i in range(n) for j in range(n) if grid[i][j] == 1)
    around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
    low = min(grid[a][b] for a, b in around if 0 <= a < n and 0 <= b < n)
    return [low if step % 2 else 1 for step in range(k)]


def tri(n):  # HumanEval/130
    values = [1, 3]
    for i in range(2, n + 1):
        values.append(1 + i // 2 if i % 2 == 0 else values[-1] + values[-2] + 1 + (i + 1) // 2)
    return values[: n + 1]


def digits(n):  # HumanEval/131
    odd = [int(digit) for digit in str(n) if int(digit) % 2]
    return math.prod(odd) if odd else 0


def is_nested(s):  # HumanEval/132
    rest = iter(s)
    return all(c in rest for c in "[[]]")


def sum_squares(values):  # HumanEval/133
    return sum(math.ceil(value) ** 2 for value in values)


def check_if_last_char_is_a_letter(text):  # HumanEval/134
    last = text.split(" ")[-1]
    return len(last) == 1 and last.isalpha()


def can_arrange(values):  # HumanEval/135
    return max((i for i in range(1, len(values)) if values[i] < values[i - 1]), default=-1)


def largest_smallest_integers(values):  # HumanEval/136
    negative, positive = [v for v in values if v < 0], [v for v in values if v > 0]
    return max(negative, default=None), min(positive, default=None)


def compare_one(a, b):  # HumanEval/137
    x, y = (float(str(n).replace(",", ".")) for n in (a, b))
    return None if x == y else a if x > y else b


def is_equal_to_sum_even(n):  # HumanEval/138
    return n >= 8 and n % 2 == 0


def special_factorial(n):  # HumanEval/139
    return math.prod(math.factorial(k) for k in range(1, n + 1))


def fix_spaces(text):  # HumanEval/140
    while "   " in text:
        start = text.index("   ")
        rest = text[start:].lstrip(" ")
        text = text[:start] + "-" + rest
    return text.replace(" ", "_")


def file_name_check(name):  # HumanEval/141
    start, _, end = name.partition(".")
    few = sum(map(str.isdigit, name)) <= 3
    begins = start[:1].isascii() and start[:1].isalpha()
    return "Yes" if few and begins and end in ("txt", "exe", "dll") else "No"


def sum_squares(values):  # HumanEval/142  # noqa: F811
    return sum(v**2 if i % 3 == 0 else v**3 if i % 4 == 0 else v for i, v in enumerate(values))


def words_in_sentence(sentence):  # HumanEval/143
    return " ".join(word for word in sentence.split() if _is_prime(len(word)))


def simplify(x, n):  # HumanEval/144
    (a, b), (c, d) = (map(int, text.split("/")) for text in (x, n))
    return a * c % (b * d) == 0


def order_by_points(values):  # HumanEval/145
    return sorted(values, key=lambda value: sum(_signed_digits(value)))


def specialFilter(values):  # HumanEval/146
    return sum(n > 10 and int(str(n)[0]) % 2 and n % 2 for n in values)


def get_max_triples(n):  # HumanEval/147
    values = [i * i - i + 1 for i in range(1, n + 1)]
    return sum(sum(three) % 3 == 0 for three in combinations(values, 3))


_PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")


def bf(a, b):  # HumanEval/148
    if a not in _PLANETS or b not in _PLANETS:
        return ()
    low, high = sorted(map(_PLANETS.index, (a, b)))
    return _PLANETS[low + 1 : high]


def sorted_list_sum(words):  # HumanEval/149
    return sorted((w for w in words if len(w) % 2 == 0), key=lambda word: (len(word), word))


def x_or_y(n, x, y):  # HumanEval/150
    return x if _is_prime(n) else y


def double_the_difference(values):  # HumanEval/151
    return sum(v * v for v in values if isinstance(v, int) and v > 0 and v % 2)


def compare(game, guess):  # HumanEval/152
    return [abs(a - b) for a, b in zip(game, guess, strict=True)]


def Strongest_Extension(name, extensions):  # HumanEval/153
    def strength(text):
        return sum(map(str.isupper, text)) - sum(map(str.islower, text))

    return f"{name}.{max(extensions, key=strength)}"


def cycpattern_check(a, b):  # HumanEval/154
    return any(b[i:] + b[:i] in a for i in range(len(b)))


def even_odd_count(n):  # HumanEval/155
    odd = sum(int(digit) % 2 for digit in str(abs(n)))
    return len(str(abs(n))) - odd, odd


_ROMAN = [(1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"),
          (40, "xl"), (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i")]  # fmt: skip


def int_to_mini_roman(number):  # HumanEval/156
    text = ""
    for value, letters in _ROMAN:
        text += letters * (number // value)
        number %= value
    return text


def right_angle_triangle(*sides):  # HumanEval/157
    a, b, c = sorted(sides)
    return a * a + b * b == c * c


def find_max(words):  # HumanEval/158
    return min(words, key=lambda word: (-len(set(word)), word))


def eat(number, need, remaining):  # HumanEval/159
    eaten = min(need, remaining)
    return [number + eaten, remaining - eaten]


def do_algebra(operator, operand):  # HumanEval/160
    parts = [str(operand[0])]
    for sign, number in zip(operator, operand[1:], strict=True):
        parts += [sign, str(number)]
    return eval(" ".join(parts))


def solve(s):  # HumanEval/161  # noqa: F811
    return s.swapcase() if any(map(str.isalpha, s)) else s[::-1]


def string_to_md5(text):  # HumanEval/162
    return hashlib.md5(text.encode()).hexdigest() if text else None


def generate_integers(a, b):  # HumanEval/163
    return [n for n in range(min(a, b), max(a, b) + 1) if n % 2 == 0 and n < 10]


def string_xor(a, b):  # HumanEval/11
    return "".join(str(int(x != y)) for x, y in zip(a, b, strict=True))


def all_prefixes(string):  # HumanEval/14
    return list(accumulate(string))


def parse_music(music_string):  # HumanEval/17
    return [{"o": 4, "o|": 2, ".|": 1}[note] for note in music_string.split()]


def how_many_times(string, substring):  # HumanEval/18
    return sum(string.startswith(substring, i) for i in range(len(string)))


_NUMERALS = "zero one two three four five six seven eight nine".split()


def sort_numbers(numbers):  # HumanEval/19
    return " ".join(sorted(numbers.split(), key=_NUMERALS.index))
