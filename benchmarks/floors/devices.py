"""Processors by their makers' data sheets: what a floor divides by.

Matrix throughput is that of bf16 with sums in fp32, without structured sparsity: where a sheet prints the sparse
figure alone, half of it. Bandwidth and memory are the sheet's, in units of 1000. Nothing here was measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One processor: FLOP/s of bf16 matrix products, bytes/s and bytes of its memory, and where the numbers stand.

    `operator_s` is what calling one operator costs before it computes; 0 for a floor, measured for a forecast.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str
    operator_s: float = 0.0


def _nvidia(name: str, tflops: float, gb_per_s: float, gb: float, source: str) -> Device:
    return Device(name, tflops * 1e12, gb_per_s * 1e9, gb * 1e9, source)


DEVICES = (
    _nvidia("H200 SXM", 989.5, 4800, 141, "NVIDIA H200 data sheet: 1,979 TFLOPS bf16 with sparsity, 4.8 TB/s, 141 GB"),
    _nvidia("H100 SXM", 989.5, 3350, 80, "NVIDIA H100 data sheet: 1,979 TFLOPS bf16 with sparsity, 3.35 TB/s, 80 GB"),
    _nvidia("A100 SXM 80GB", 312, 2039, 80, "NVIDIA A100 data sheet: 312 TFLOPS bf16, 2,039 GB/s, 80 GB"),
    _nvidia("L40S", 362, 864, 48, "NVIDIA L40S data sheet: 362.05 TFLOPS bf16, 864 GB/s, 48 GB"),
    _nvidia("RTX 4090", 165.2, 1008, 24, "NVIDIA Ada GPU architecture: 165.2 TFLOPS bf16, 1,008 GB/s, 24 GB"),
    _nvidia("L4", 121, 300, 24, "NVIDIA L4 data sheet: 242 TFLOPS bf16 with sparsity, 300 GB/s, 24 GB"),
)
