"""A published config.json, read field by field."""

from collections.abc import Mapping
from typing import Any

from megatron_espo.errors import UserError


class Config:
    """A config.json that is read field by field; what was not understood can be told."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        source: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap the fields.

        Args:
            fields: the parsed file.
            source: its path, for messages.
            defaults: what the model's own code takes for fields that the file does not have.
        """
        self.fields, self.source = {**(defaults or {}), **fields}, source
        self._absent = self.fields.keys() - fields.keys()

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Config":
        """Return the same file, read with these defaults."""
        return Config(self.fields, self.source, defaults)

    def _says(self, name: str) -> str:
        """Say what the file holds in a field, or what stands for it."""
        said = f'"{name}" is {self.fields.get(name)!r}'
        return (
            f"{said} (the model's own default; the file has none)" if name in self._absent else said
        )

    def number[Number: (int, float)](self, name: str, kind: type[Number]) -> Number:
        """Read a positive number.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{self.source}: {self._says(name)}; a positive number is needed.")
        if kind is int and value != int(value):
            raise UserError(f"{self.source}: {self._says(name)}; a whole number is needed.")
        return kind(value)

    def token(self, name: str, vocab_size: int) -> int:
        """Read a token id.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise UserError(
                f"{self.source}: {self._says(name)}; a token id below {vocab_size} is needed."
            )
        return value

    def first_token(self, name: str, vocab_size: int) -> int:
        """Read a token id, or the first of several.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name)
        if not isinstance(value, list) or not value:
            return self.token(name, vocab_size)
        ids = [Config({name: one}, self.source).token(name, vocab_size) for one in value]
        return ids[0]

    def switch(self, name: str) -> bool:
        """Read a field that is true or false; one that is absent is false.

        Raises:
            UserError: naming the field.
        """
        self.require(name, False, True)
        return bool(self.fields.get(name, False))

    def rotary(self, *, scaling: bool) -> tuple[float, float | None]:
        """Read the rotary embedding, where transformers 4 and where version 5 write it.

        Args:
            scaling: whether Llama 3's scaling of the frequencies is understood.

        Returns:
            The base, and the factor of the scaling or None.

        Raises:
            UserError: the frequencies are scaled otherwise, or the two places differ.
        """
        bases, factors = set(), set()
        for name in ("rope_parameters", "rope_scaling"):
            rope = self.fields.get(name)
            if rope is None:
                continue
            if scaling and isinstance(rope, Mapping) and rope.get("rope_type") == "llama3":
                factors.add(_llama3_factor(Config(rope, f'{self.source}: "{name}"')))
            elif not _is_plain(rope):
                kinds = 'of the type "default", without scaling' + " or llama3" * scaling
                raise UserError(
                    f'{self.source}: "{name}" is {rope!r}, which is not supported; rotary '
                    f"embeddings must be {kinds}."
                )
            if "rope_theta" in rope:
                bases.add(Config(rope, f'{self.source}: "{name}"').number("rope_theta", float))
        # transformers 5 leaves the field itself out.
        stated = "rope_theta" in self.fields and "rope_theta" not in self._absent
        if stated or not bases:
            bases.add(self.number("rope_theta", float))
        for name, values in (("rope_theta", bases), ("factor", factors)):
            if len(values) > 1:
                raise UserError(
                    f'{self.source}: "{name}" is {" and ".join(map(str, sorted(values)))} in two '
                    "places; correct one."
                )
        return bases.pop(), factors.pop() if factors else None

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse a value that changes what the model computes.

        Args:
            name: the field; one that is absent takes the first allowed value.
            allowed: the values that are supported.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name, allowed[0])
        if not any(value == one and type(value) is type(one) for one in allowed):
            wanted = " or ".join(repr(one) for one in allowed)
            raise UserError(
                f"{self.source}: {self._says(name)}, which is not supported; it must be {wanted}."
            )


# What says no more than that nothing is scaled, in what either version of transformers writes.
_PLAIN_ROPE = (
    ("rope_type", "default"),
    ("type", "default"),
    ("factor", 1.0),
    ("partial_rotary_factor", 1.0),
)


LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Llama 3.1's and 3.2's scaling of rotary frequencies, which Megatron takes for granted."""


def _is_plain(rope: Any) -> bool:
    return isinstance(rope, Mapping) and all(
        key == "rope_theta" or (key, value) in _PLAIN_ROPE for key, value in rope.items()
    )


def _llama3_factor(rope: Config) -> float:
    """Read the factor of Llama 3's scaling (transformers' rope type llama3).

    Raises:
        UserError: another field of it has a value that Megatron does not compute.
    """
    for name, value in LLAMA3_SCALING.items():
        rope.require(name, value, int(value))
    known = {"rope_type", "type", "rope_theta", "factor", *LLAMA3_SCALING}
    for name in rope.fields:
        if name not in known:
            rope.require(name, None)
    return rope.number("factor", float)
