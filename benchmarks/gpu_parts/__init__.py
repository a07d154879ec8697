"""The parts of benchmarks/gpu.py: what is checked, measured and tuned on an accelerator."""
