"""Near-Policy Distillation at Megatron scale. `npd --help` lists the commands; README.md shows the way in."""

__version__ = "0.1.0"
