"""Solutions to problems of HumanEval, to check the code task's reward with real problems.

A function solves the problem whose tests call it; names with an underscore are helpers.
"""

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
        if is_palindrome(string[start:]):  # noqa: F821
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
