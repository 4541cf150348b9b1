"""Solutions to problems of MBPP's test split, to check the code task's reward with real problems.

A function solves the problem whose tests call it; the numbers are MBPP's.
"""

import bisect
import cmath
import heapq
import math
import re
from collections import Counter, defaultdict
from itertools import combinations, groupby, pairwise
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


def check(n):  # 56
    return 2 * int(str(n)[::-1]) - 1 == n


def find_Max_Num(digits, n):  # 57
    return int("".join(map(str, sorted(digits, reverse=True))))


def opposite_Signs(x, y):  # 58
    return (x < 0) != (y < 0)


def is_octagonal(n):  # 59
    return 3 * n * n - 2 * n


def count_Substrings(s, n):  # 61
    sums = [0]
    for digit in s:
        sums.append(sums[-1] + int(digit) - 1)
    return sum(comb(count, 2) for count in Counter(sums).values())


def smallest_num(numbers):  # 62
    return min(numbers)


def max_difference(pairs):  # 63
    return max(abs(a - b) for a, b in pairs)


def subject_marks(marks):  # 64
    return sorted(marks, key=lambda pair: pair[1])


def recursive_list_sum(values):  # 65
    return sum(recursive_list_sum(v) if isinstance(v, list) else v for v in values)


def pos_count(numbers):  # 66
    return sum(n >= 0 for n in numbers)


def bell_number(n):  # 67
    row = [1]
    for _ in range(n):
        following = [row[-1]]
        for value in row:
            following.append(following[-1] + value)
        row = following
    return row[0]


def is_Monotonic(numbers):  # 68
    return numbers in (sorted(numbers), sorted(numbers, reverse=True))


def is_sublist(values, part):  # 69
    return any(values[i : i + len(part)] == part for i in range(len(values) - len(part) + 1))


def get_equal(rows, k):  # 70
    same = all(len(row) == k for row in rows)
    return "All tuples have same length" if same else "All tuples do not have same length"


def comb_sort(values):  # 71
    return sorted(values)


def dif_Square(n):  # 72
    return n % 4 != 2


def multiple_split(text):  # 73
    return re.split(r"; |, |\*|\n", text)


def is_samepatterns(colors, patterns):  # 74
    pairs = set(zip(colors, patterns, strict=False))
    same = len(pairs) == len(set(colors)) == len(set(patterns))
    return len(colors) == len(patterns) and same


def find_tuples(rows, k):  # 75
    return str([row for row in rows if all(n % k == 0 for n in row)])


def count_Squares(m, n):  # 76
    return sum((m - k) * (n - k) for k in range(min(m, n)))


def is_Diff(n):  # 77
    return n % 11 == 0


def count_With_Odd_SetBits(n):  # 78
    return sum(k.bit_count() % 2 for k in range(n + 1))


def word_len(text):  # 79
    return any(len(word) % 2 for word in text.split())


def tetrahedral_number(n):  # 80
    return n * (n + 1) * (n + 2) / 6


def zip_tuples(a, b):  # 81
    return [(value, b[i % len(b)]) for i, value in enumerate(a)]


def volume_sphere(r):  # 82
    return (4 / 3) * math.pi * r * r * r


def get_Char(text):  # 83
    return chr(ord("a") + (sum(ord(c) - ord("a") + 1 for c in text) - 1) % 26)


def sequence(n):  # 84
    values = [0, 1, 1]
    for k in range(3, n + 1):
        values.append(values[values[k - 1]] + values[k - values[k - 1]])
    return values[n]


def surfacearea_sphere(r):  # 85
    return 4 * math.pi * r * r


def centered_hexagonal_number(n):  # 86
    return 3 * n * (n - 1) + 1


def merge_dictionaries_three(a, b, c):  # 87
    return c | b | a


def freq_count(values):  # 88
    return Counter(values)


def closest_num(n):  # 89
    return n - 1


def len_log(words):  # 90
    return max(map(len, words))


def find_substring(texts, part):  # 91
    return any(part in text for text in texts)


def is_undulating(n):  # 92
    return len(n) > 2 and n[0] != n[1] and all(n[i] == n[i - 2] for i in range(2, len(n)))


def power(a, b):  # 93
    return a**b


def index_minimum(pairs):  # 94
    return min(pairs, key=lambda pair: pair[1])[0]


def Find_Min_Length(lists):  # 95
    return min(map(len, lists))


def divisor(n):  # 96
    return sum(n % k == 0 for k in range(1, n + 1))


def frequency_lists(lists):  # 97
    return dict(Counter(value for row in lists for value in row))


def multiply_num(numbers):  # 98
    return prod(numbers) / len(numbers)


def decimal_to_binary(n):  # 99
    return f"{n:b}"


def next_smallest_palindrome(n):  # 100
    n += 1
    while str(n) != str(n)[::-1]:
        n += 1
    return n


def kth_element(values, n, k):  # 101
    return values[k - 1]


def snake_to_camel(word):  # 102
    return "".join(part.capitalize() for part in word.split("_"))


def eulerian_num(n, m):  # 103
    return sum((-1) ** k * comb(n + 1, k) * (m + 1 - k) ** n for k in range(m + 1))


def sort_sublists(lists):  # 104
    return [sorted(row) for row in lists]


def count(values, wanted=True):  # 105, 204
    return sum(value == wanted for value in values)


def add_lists(values, first):  # 106
    return first + tuple(values)


def count_Hexadecimal(low, high):  # 107
    return sum(c in "abcdef" for n in range(low, high + 1) for c in f"{n:x}")


def merge_sorted_list(*lists):  # 108
    return list(heapq.merge(*map(sorted, lists)))


def odd_Equivalent(s, n):  # 109
    return s[:n].count("1")


def perimeter(d, h):  # 112
    return 2 * (d + h)


def check_integer(text):  # 113
    return re.fullmatch(r"[+-]?\d+", text) is not None


def assign_freq(rows):  # 114
    return str([(*row, n) for row, n in Counter(rows).items()])


def empty_dit(values):  # 115
    return not any(values)


def tuple_to_int(digits):  # 116
    return int("".join(map(str, digits)))


def _float(text):
    try:
        return float(text)
    except ValueError:
        return text


def list_to_float(rows):  # 117
    return str([tuple(map(_float, row)) for row in rows])


def string_to_list(text):  # 118
    return text.split(" ")


def search(values, n):  # 119
    return next(value for value, count in Counter(values).items() if count == 1)


def max_product_tuple(pairs):  # 120
    return max(abs(a * b) for a, b in pairs)


def check_triplet(values, n, total, count):  # 121
    return any(sum(three) == total for three in combinations(values, 3))


def _proper(n):
    return 1 + sum(k + (n // k if k * k != n else 0) for k in range(2, math.isqrt(n) + 1)
                   if n % k == 0) if n > 1 else 0  # fmt: skip


def amicable_numbers_sum(limit):  # 123
    sums = {n: _proper(n) for n in range(1, limit + 1)}
    return sum(n for n, other in sums.items() if other != n and sums.get(other) == n)


def angle_complex(a, b):  # 124
    return cmath.phase(a + b)


def find_length(text, n):  # 125
    best = run = 0
    for c in text[:n]:
        run = max(0, run + (1 if c == "0" else -1))
        best = max(best, run)
    return best


def sum(a, b):  # 126
    total = 0
    for k in range(1, min(a, b) + 1):
        if a % k == b % k == 0:
            total += k
    return total


def multiply_int(a, b):  # 127
    product = 0
    for _ in range(abs(b)):
        product += a
    return -product if b < 0 else product


def long_words(n, text):  # 128
    return [word for word in text.split() if len(word) > n]


def max_occurrences(values):  # 130
    return Counter(values).most_common(1)[0]


def reverse_vowels(text):  # 131
    vowels = [c for c in text if c in "aeiouAEIOU"]
    return "".join(vowels.pop() if c in "aeiouAEIOU" else c for c in text)


def tup_string(parts):  # 132
    return "".join(parts)


def check_last(values, n, p):  # 134
    total = 0
    for value in values:
        total += value
    return "ODD" if p == 1 and total % 2 == 0 else "EVEN"


def hexagonal_num(n):  # 135
    return n * (2 * n - 1)


def zero_count(values):  # 137
    return round(values.count(0) / len(values), 2)


def is_Sum_Of_Powers_Of_Two(n):  # 138
    return n % 2 == 0


def circle_circumference(r):  # 139
    return 2 * 3.1415 * r


def extract_singly(rows):  # 140
    return list(dict.fromkeys(value for row in rows for value in row))


def pancake_sort(values):  # 141
    return sorted(values)


def count_samepair(a, b, c):  # 142
    return len([1 for x, y, z in zip(a, b, c, strict=False) if x == y == z])


def find_lists(value):  # 143
    return 1 if isinstance(value, list) else len([v for v in value if isinstance(v, list)])


def sum_Pairs(values, n):  # 144
    total = 0
    for a, b in combinations(values, 2):
        total += abs(a - b)
    return total


def max_Abs_Diff(values, n):  # 145
    return max(values) - min(values)


def ascii_value_string(text):  # 146
    return ord(text[0])


def max_path_sum(triangle, m, n):  # 147
    best = [0] * (len(triangle) + 1)
    for row in reversed(triangle[: m + 1]):
        best = [value + max(best[i], best[i + 1]) for i, value in enumerate(row[: len(best) - 1])]
        best.append(0)
    return best[0]


def does_Contain_B(a, b, c):  # 150
    return a == b or (c != 0 and (b - a) * c > 0 and (b - a) % c == 0)


def is_coprime(a, b):  # 151
    return gcd(a, b) == 1


def merge_sort(values):  # 152
    if len(values) < 2:
        return values
    middle = len(values) // 2
    return list(heapq.merge(merge_sort(values[:middle]), merge_sort(values[middle:])))


def parabola_vertex(a, b, c):  # 153
    return -b / (2 * a), (4 * a * c - b * b) / (4 * a)


def even_bit_toggle_number(n):  # 155
    return n ^ int("10" * (n.bit_length() // 2) or "0", 2)


def tuple_int_str(rows):  # 156
    return tuple(tuple(map(int, row)) for row in rows)


def encode_list(values):  # 157
    return [[len(list(group)), value] for value, group in groupby(values)]


def solution(a, b, n):  # 160
    for x in range(n // a + 1):
        if (n - a * x) % b == 0:
            return "x = ", x, ", y = ", (n - a * x) // b
    return "No solution"


def remove_elements(values, dropped):  # 161
    return [value for value in values if value not in dropped]


def sum_series(n):  # 162
    return n + sum_series(n - 2) if n > 0 else 0


def area_polygon(s, length):  # 163
    return s * (length * length) / (4 * math.tan(math.pi / s))


def areEquivalent(a, b):  # 164
    return _proper(a) == _proper(b)


def count_char_position(text):  # 165
    return len([1 for i, c in enumerate(text.lower()) if ord(c) - ord("a") == i])


def find_even_Pair(values, n):  # 166
    return len([1 for a, b in combinations(values, 2) if (a ^ b) % 2 == 0])


def next_Power_Of_2(n):  # 167
    return 1 << max(n - 1, 0).bit_length()


def frequency(values, wanted):  # 168
    return values.count(wanted)


def get_pell(n):  # 169
    a, b = 0, 1
    for _ in range(n):
        a, b = b, 2 * b + a
    return a


def perimeter_pentagon(a):  # 171
    return 5 * a


def count_occurance(text):  # 172
    return text.count("std")


def remove_splchar(text):  # 173
    return "".join(c for c in text if c.isalnum())


def group_keyvalue(pairs):  # 174
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def is_valid_parenthese(text):  # 175
    stack = []
    for c in text:
        if c in "({[":
            stack.append(")}]"["({[".index(c)])
        elif not stack or stack.pop() != c:
            return False
    return not stack


def perimeter_triangle(a, b, c):  # 176
    return a + b + c


def answer(low, high):  # 177
    return (low, 2 * low) if 2 * low <= high else -1


def string_literals(patterns, text):  # 178
    return "Matched!" if any(p in text for p in patterns) else "Not Matched!"


def is_num_keith(n):  # 179
    terms = list(map(int, str(n)))
    while terms[-1] < n:
        total = 0
        for term in terms[-len(str(n)) :]:
            total += term
        terms.append(total)
    return terms[-1] == n


def common_prefix(words, n):  # 181
    first, last = min(words), max(words)
    size = 0
    while size < len(first) and first[size] == last[size]:
        size += 1
    return first[:size]


def find_character(text):  # 182
    return tuple(re.findall(p, text) for p in ("[A-Z]", "[a-z]", "[0-9]", "[, .!?]"))


def count_pairs(values, n, k):  # 183
    return len([1 for a, b in combinations(values, 2) if abs(a - b) == k])


def greater_specificnum(values, n):  # 184
    return all(value >= n for value in values)


def parabola_focus(a, b, c):  # 185
    return -b / (2 * a), (4 * a * c - b * b + 1) / (4 * a)


def check_literals(text, patterns):  # 186
    return "Matched!" if re.search("|".join(patterns), text) else "Not Matched!"


def longest_common_subsequence(a, b, m, n):  # 187
    best = [0] * (n + 1)
    for x in a[:m]:
        before = best[:]
        for j, y in enumerate(b[:n]):
            best[j + 1] = before[j] + 1 if x == y else max(before[j + 1], best[j])
    return best[n]


def first_Missing_Positive(values, n):  # 189
    found = 1
    while found in values:
        found += 1
    return found


def count_Intgral_Points(x1, y1, x2, y2):  # 190
    return (x2 - x1 - 1) * (y2 - y1 - 1)


def check_monthnumber(month):  # 191
    return month in ("April", "June", "September", "November")


def check_String(text):  # 192
    return any(map(str.isalpha, text)) and any(map(str.isdigit, text))


def remove_tuple(values):  # 193
    return tuple(set(values))


def octal_To_Decimal(n):  # 194
    return int(str(n), 8)


def first(values, wanted, n):  # 195
    return values.index(wanted) if wanted in values else -1


def remove_tuples(rows, k):  # 196
    return [row for row in rows if len(row) != k]


def find_exponentio(a, b):  # 197
    return tuple(x**y for x, y in zip(a, b, strict=True))


def largest_triangle(a, b):  # 198
    return -1 if a < 0 or b < 0 else 3 * math.sqrt(3) * a * a / (4 * b)


def highest_Power_of_2(n):  # 199
    return 1 << (n.bit_length() - 1)


def position_max(values):  # 200
    return [i for i, value in enumerate(values) if value == max(values)]


def chkList(values):  # 201
    return len(set(values)) <= 1


def remove_even(text):  # 202
    return text[::2]


def hamming_Distance(a, b):  # 203
    return (a ^ b).bit_count()


def inversion_elements(values):  # 205
    return tuple(~value for value in values)


def concatenate_elements(parts):  # 206
    return tuple(a + b for a, b in pairwise(parts))


def find_longest_repeating_subseq(text):  # 207
    n = len(text)
    best = [[0] * (n + 1) for _ in range(n + 1)]
    for i in range(n):
        for j in range(n):
            same = text[i] == text[j] and i != j
            best[i + 1][j + 1] = best[i][j] + 1 if same else max(best[i][j + 1], best[i + 1][j])
    return best[n][n]


def is_decimal(text):  # 208
    return bool(re.fullmatch(r"\d+(\.\d{1,2})?", text))


def heap_replace(heap, item):  # 209
    heapq.heapify(heap)
    heapq.heapreplace(heap, item)
    return heap


def is_allowed_specific_char(text):  # 210
    return re.search("[^a-zA-Z0-9]", text) is None


def count_Num(n):  # 211
    return 1 if n == 1 else 1 << (n - 2)


def fourth_Power_Sum(n):  # 212
    total = 0
    for k in range(1, n + 1):
        total += k**4
    return total


def concatenate_strings(a, b):  # 213
    return tuple(x + y for x, y in zip(a, b, strict=True))


def degree_radian(angle):  # 214
    return angle * (180 / math.pi)


def decode_list(values):  # 215
    found = []
    for value in values:
        found += [value[1]] * value[0] if isinstance(value, list) else [value]
    return found


def first_Repeated_Char(text):  # 217
    return next((c for i, c in enumerate(text) if c in text[:i]), "\0")


def extract_min_max(values, k):  # 219
    values = sorted(values)
    return tuple(values[:k] + values[max(k, len(values) - k) :])


def replace_max_specialchar(text, n):  # 220
    return re.sub("[ ,.]", ":", text, count=n)


def first_even(values):  # 221
    return next((value for value in values if value % 2 == 0), -1)


def check_type(values):  # 222
    return len(set(map(type, values))) <= 1


def is_majority(values, n, x):  # 223
    return bisect.bisect_right(values, x) - bisect.bisect_left(values, x) > n // 2


def count_Set_Bits(n):  # 224
    return n.bit_count()


def find_Min(values, low, high):  # 225
    return min(values[low : high + 1])


def odd_values_string(text):  # 226
    return text[::2]


def min_of_three(a, b, c):  # 227
    return min(a, b, c)


def all_Bits_Set_In_The_Given_Range(n, low, high):  # 228
    return not n >> (low - 1) & ((1 << (high - low + 1)) - 1)


def re_arrange_array(values, n):  # 229
    place = 0
    for i in range(n):
        if values[i] < 0:
            values[i], values[place] = values[place], values[i]
            place += 1
    return values


def replace_blank(text, c):  # 230
    return text.replace(" ", c)


def larg_nnum(values, n):  # 232
    return heapq.nlargest(n, values)


def lateralsuface_cylinder(r, h):  # 233
    return 2 * 3.1415 * r * h


def volume_cube(a):  # 234
    return a**3


def even_bit_set_number(n):  # 235
    return n | int("10" * (n.bit_length() // 2) or "0", 2)


def No_of_Triangle(n, k):  # 236
    return -1 if n < k else (n - k + 1) * (n - k + 2) // 2 + (n - 2 * k + 1) * (n - 2 * k + 2) // 2


def check_occurences(pairs):  # 237
    return Counter(tuple(sorted(pair)) for pair in pairs)


def number_of_substrings(text):  # 238
    return len(text) * (len(text) + 1) // 2


def replace_list(values, tail):  # 240
    return [*values[:-1], *tail]


def array_3d(m, n, o):  # 241
    return [[["*"] * m for _ in range(n)] for _ in range(o)]


def count_charac(text):  # 242
    return len(text)


def next_Perfect_Square(n):  # 244
    return (math.isqrt(n) + 1) ** 2


def count_Primes_nums(n):  # 256
    return len([k for k in range(2, n) if all(k % d for d in range(2, math.isqrt(k) + 1))])


def swap_numbers(a, b):  # 257
    return b, a


def count_odd(values):  # 258
    return len([value for value in values if value % 2])


def maximize_elements(a, b):  # 259
    return tuple(tuple(map(max, x, y)) for x, y in zip(a, b, strict=True))


def newman_prime(n):  # 260
    return 1 if n < 2 else 2 * newman_prime(n - 1) + newman_prime(n - 2)


def division_elements(a, b):  # 261
    return tuple(x // y for x, y in zip(a, b, strict=True))


def split_two_parts(values, n):  # 262
    return values[:n], values[n:]


def merge_dict(a, b):  # 263
    return {**a, **b}


def dog_age(years):  # 264
    return years * 10.5 if years <= 2 else 21 + (years - 2) * 4


def list_split(values, n):  # 265
    return [values[i::n] for i in range(n)]


def lateralsurface_cube(a):  # 266
    return 4 * a * a


def find_star_num(n):  # 268
    return 6 * n * (n - 1) + 1


def ascii_value(c):  # 269
    return ord(c)


def even_Power_Sum(n):  # 271
    total = 0
    for k in range(1, n + 1):
        total += (2 * k) ** 5
    return total


def rear_extract(rows):  # 272
    return [row[-1] for row in rows]


def substract_elements(a, b):  # 273
    return tuple(x - y for x, y in zip(a, b, strict=True))


def even_binomial_Coeff_Sum(n):  # 274
    return 1 << (n - 1)


def volume_cylinder(r, h):  # 276
    return 3.1415 * r * r * h


def dict_filter(values, n):  # 277
    return {key: value for key, value in values.items() if value >= n}


def count_first_elements(values):  # 278
    return next(i for i, value in enumerate(values) if isinstance(value, tuple))


def is_num_decagonal(n):  # 279
    return 4 * n * n - 3 * n


def sequential_search(values, wanted):  # 280
    return (True, values.index(wanted)) if wanted in values else (False, len(values))


def all_unique(values):  # 281
    return len(set(values)) == len(values)


def sub_list(a, b):  # 282
    return [x - y for x, y in zip(a, b, strict=True)]


def validate(n):  # 283
    return all(count <= int(digit) for digit, count in Counter(str(n)).items())


def check_element(values, wanted):  # 284
    return all(value == wanted for value in values)


def text_match_two_three(text):  # 285
    return "Found a match!" if re.search("ab{2,3}", text) else "Not matched!"


def max_length(lists):  # 290
    longest = max(lists, key=len)
    return len(longest), longest


def find(n, m):  # 292
    return n // m


def otherside_rightangle(a, b):  # 293
    return math.sqrt(a * a + b * b)


def max_val(values):  # 294
    return max(value for value in values if isinstance(value, int))


def sum_div(n):  # 295
    return _proper(n)


def get_Inv_Count(values, n):  # 296
    return len([1 for a, b in combinations(values, 2) if a > b])


def flatten_list(values):  # 297
    return [x for v in values for x in (flatten_list(v) if isinstance(v, list) else [v])]


def dict_depth(value):  # 301
    return 1 + max(map(dict_depth, value.values()), default=0) if isinstance(value, dict) else 0


def set_Bit_Number(n):  # 302
    return 1 << (n.bit_length() - 1) if n else 0


def maximum(a, b):  # 309
    return max(a, b)


def string_to_tuple(text):  # 310
    return tuple(text.replace(" ", ""))


def check(text):  # 349  # noqa: F811
    return "Yes" if set(text) <= {"0", "1"} else "No"


def max_occurrences(values):  # 362  # noqa: F811
    return Counter(values).most_common(1)[0][0]


def even_bit_toggle_number(n):  # 383  # noqa: F811
    return n ^ int("01" * ((n.bit_length() + 1) // 2) or "0", 2)


def concatenate_elements(words):  # 500  # noqa: F811
    return "  " + " ".join(words)


def find(n, m):  # 502  # noqa: F811
    return n % m
