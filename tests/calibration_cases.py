"""A calibration that several tests use."""

from __future__ import annotations

from blendserve.costs.stored_calibration import Calibration

CALIBRATION = Calibration(
    machine="a box",
    dtype="bf16",
    num_threads=2,
    gemm_flop_per_s=2e11,
    weight_bytes_per_s=2e10,
    kv_bytes_per_s=3e10,
    prefill_attention_flop_per_s=1e11,
    layer_constant_s=3e-6,
    loop_s=1e-5,
    compute_delay=0.6,
    memory_delay=0.5,
    memory_bytes=8e9,
    gemm_points=((1, 1e10), (256, 2e11)),
    step_points=((1, 1e10), (256, 2e11)),
    bandwidth_points=((1, 2e10), (2, 3e10)),
)
