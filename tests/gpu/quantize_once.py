"""Every quantization kernel once, on shapes that divide nothing: a program for compute-sanitizer.

compute-sanitizer --tool memcheck python tests/gpu/quantize_once.py
"""

import torch

import nvfp4dsl as nv
from nvfp4dsl import quantization

for m, k in ((1, 16), (131, 272), (300, 4368)):
    x, up, residual = (torch.randn(m, k, device="cuda").bfloat16() for _ in range(3))
    scale, counts = torch.full((), 0.01, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    for layout in quantization.LAYOUTS:
        for given in (scale, None):
            for choose in (False, True):
                quantization.quantize(x, given, layout=layout, four_over_six=choose, linear_scales=True)
            quantization.quantize(x, given, layout=layout, up=up)
        quantization.quantize(x, scale, layout=layout, saturation=counts)
        quantization.rms_norm(x, up[0], 1e-6, scale, residual, layout=layout, saturation=counts)
        quantization.rms_norm(x, up[0], 1e-6, scale, layout=layout)
    torch.cuda.synchronize()
print(nv.__name__, "done")
