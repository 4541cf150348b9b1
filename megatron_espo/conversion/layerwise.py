"""Models whose weights are in memory only while their layer computes."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn import Module, Parameter


def stream_weights(
    model: Module,
    parts: Sequence[str],
    load: Callable[[Sequence[str]], Mapping[str, Tensor]],
    kept: Sequence[str] = (),
) -> None:
    """Give each part of a model its weights before its forward pass and take them back after.

    Args:
        model: a model on the meta device.
        parts: paths of the parts, where ``*`` stands for a number; every parameter, and every
            buffer that is saved with them, must be in one.
        load: reads parameters and buffers by name.
        kept: parts that keep their weights, because others use them, too.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True)
    parameters |= {name: b for name, b in model.named_buffers() if name in saved}
    covered: set[str] = set()
    for path, module in model.named_modules():
        if not any(
            fnmatch.fnmatchcase(path, part) and path.count(".") == part.count(".") for part in parts
        ):
            continue
        names = [name for name in parameters if name.startswith(f"{path}.")]
        covered.update(names)

        def fill(_module: Module, _inputs: object, names: Sequence[str] = tuple(names)) -> None:
            for name, tensor in load(names).items():
                _replace(model, name, tensor)

        def empty(
            _module: Module, _in: object, _out: object, names: Sequence[str] = tuple(names)
        ) -> None:
            for name in names:
                _replace(model, name, parameters[name])

        module.register_forward_pre_hook(fill)
        if path not in kept:
            module.register_forward_hook(empty)
    assert covered == parameters.keys(), sorted(parameters.keys() - covered)


def _replace(model: Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = tensor if isinstance(tensor, Parameter) else Parameter(tensor, requires_grad=False)
    module._parameters[leaf] = parameter
