"""Static global scales: where they come from, and whether they still fit."""

from __future__ import annotations

import sys
import warnings

import torch

from nvfp4dsl import dispatch, quantization, reference
from nvfp4dsl.constants import E2M1_MAX, E4M3_MAX, FP32_MIN_NORMAL
from nvfp4dsl.errors import CalibrationError, OperandError, SaturationWarning

SATURATED_SHARE = 0.01
"""Share of saturated blocks above which a static scale is warned of."""


class Calibration:
    """The largest magnitude over all that it sees, and from it a static global scale. Nothing waits for the device.

    >>> calibration = nv.Calibration()
    >>> for batch in batches:
    ...     calibration.observe(batch)
    >>> y = nv.quantize(x, calibration.global_scale())
    """

    def __init__(self) -> None:
        self._amax: torch.Tensor | None = None

    def observe(self, x: torch.Tensor) -> None:
        """Take x, bf16, fp16 or fp32 [..., M, K], into account. One without values counts for nothing.

        Raises:
            OperandError: unfit dtype, shape or K; on a CPU, a value that is not finite; another device than before.
        """
        reference.check_rows(x)
        if not x.numel():
            return
        if self._amax is not None and self._amax.device != x.device:
            raise OperandError(f"x is on {x.device}, what came before on {self._amax.device}; calibrate on one device")
        if x.device.type == "cpu":
            reference.check_finite(x)
        x = x.detach()  # or the maximum would hold on to the graph that x comes from
        amax = x.abs().amax().float() if dispatch.site(x.device) is None else quantization.amax(x)
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)

    def global_scale(self) -> torch.Tensor:
        """``amax / (448 * 6)``, fp32 [], on the device of what was seen; 1 if all of it was zero.

        Raises:
            CalibrationError: it saw nothing yet.
        """
        if self._amax is None:
            raise CalibrationError("this calibration saw no data; call observe(x) on representative tensors first")
        # A tensor: torch divides a CUDA tensor by a number through its reciprocal, which is off in the last bit.
        scale = self._amax / torch.full_like(self._amax, E4M3_MAX * E2M1_MAX)
        return torch.where(self._amax == 0, 1.0, scale.clamp(min=FP32_MIN_NORMAL))


class Saturation:
    """Counts the blocks that a static global scale is too small for, on the device. Give it to ``quantize``.

    A block saturates if e4m3 has no scale for it (:func:`nvfp4dsl.reference.saturated_blocks`). When more than one in
    a hundred do, one :class:`SaturationWarning` is given: at the first call after the device's count has come over by
    itself, since no call waits for it.
    """

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._arriving: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._warned = False

    def counts(self, device: torch.device) -> torch.Tensor:
        """int64 [2], on ``device``: saturated blocks, blocks.

        Raises:
            OperandError: it has counted on another device.
        """
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        if self._counts.device != device:
            raise OperandError(f"this Saturation counts on {self._counts.device}, x is on {device}; use one each")
        return self._counts

    def share(self) -> float:
        """Saturated blocks among all so far, 0 before there are any. Waits for the device."""
        return 0.0 if self._counts is None else self._share(self._counts.cpu())

    def check(self) -> None:
        """Warn, once, if what is known of the counts calls for it, and have them brought over; waits for nothing."""
        if self._warned or self._counts is None or torch.compiler.is_compiling():
            return
        if not self._counts.is_cuda:
            self._judge(self._counts)
        elif not torch.cuda.is_current_stream_capturing():
            if self._arriving is None:
                counts = torch.empty(2, dtype=torch.int64, pin_memory=True)
                counts.copy_(self._counts, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._arriving = counts, event
            elif self._arriving[1].query():
                self._judge(self._arriving[0])
                self._arriving = None

    def _judge(self, counts: torch.Tensor) -> None:
        share = self._share(counts)
        if share > SATURATED_SHARE:
            self._warned = True
            warnings.warn(
                f"{share:.1%} of the blocks so far are too large for the static global scale and were clipped; "
                "calibrate again on data like this, or leave the global scale out",
                SaturationWarning,
                stacklevel=_stacklevel(),
            )

    @staticmethod
    def _share(counts: torch.Tensor) -> float:
        saturated, blocks = counts.tolist()
        return saturated / blocks if blocks else 0.0


def _stacklevel() -> int:
    """What makes a warning of the caller's point outside this package, whichever function was called from there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level
