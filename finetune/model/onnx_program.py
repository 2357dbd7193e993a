"""Export a module from uint8 images with torch's ONNX exporter. Its options are chosen only here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from finetune.runtime.session import INPUT_NAME, OPSET

_TRACED_BATCH = 2  # with 1, the exporter would treat the batch size as a constant


def onnx_program(
    module: nn.Module,
    input_size_px: tuple[int, int],
    outputs: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    optimize: bool = True,
) -> torch.onnx.ONNXProgram:
    """Export a module that takes images (B, h, w, 3) uint8, with a dynamic batch size and the input `INPUT_NAME`.

    Args:
        input_size_px: height and width of the images.
        outputs: names of the module's outputs, in order.
        optimize: whether to run the exporter's optimizer, which folds constants.

    Raises:
        torch.onnx.errors.OnnxExporterError: the module cannot be expressed in ONNX.
    """
    images = torch.zeros((_TRACED_BATCH, *input_size_px, 3), dtype=torch.uint8, device=device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own implementation
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            optimize=optimize,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=list(outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    return program
