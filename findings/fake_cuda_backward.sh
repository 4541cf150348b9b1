#!/usr/bin/env bash
# PyTorch 2.15.0, a build for CUDA, on a machine without a GPU (or with all of them hidden).
#
# FakeTensorMode makes tensors on "cuda" without one: shapes, types and devices of a forward pass
# can be checked anywhere. Expected: a backward pass, too, since nothing is computed. Seen: autograd's
# engine asks CUDA's hooks which devices have a context, and the hooks refuse device 0, which the mode
# itself has made tensors on:
#
#   RuntimeError: hasPrimaryContext expects a valid device index, but got device_index=0
#
# The same pass on fake CPU tensors runs. Met when a training step was run on fake devices.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.5.5
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

assert torch.__version__.startswith("2.15.0"), torch.__version__
if torch.version.cuda is None:
    raise SystemExit("this platform's PyTorch is no build for CUDA: nothing to show")
assert not torch.cuda.is_available()


def backward(device: str) -> str:
    with FakeTensorMode():
        weight = torch.empty(4, 4, device=device, requires_grad=True)
        loss = (weight @ weight).sum()
        assert loss.device.type == device
        try:
            loss.backward()
        except RuntimeError as error:
            return str(error)
        return "ran"


on_cpu, on_cuda = backward("cpu"), backward("cuda")
print("backward pass on fake CPU tensors:", on_cpu)
print("backward pass on fake CUDA tensors:", on_cuda)
assert on_cpu == "ran"
assert "hasPrimaryContext" in on_cuda, "the behaviour has changed"
PYTHON
echo "as described"
