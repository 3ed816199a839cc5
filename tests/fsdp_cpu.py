"""Run train_colm.py under real FSDP2 on CPU ranks (gloo). Accelerate itself offers FSDP on accelerators only.

torchrun --nproc_per_node 2 tests/fsdp_cpu.py [flags of train_colm.py]
"""

import os
import sys
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
os.environ.setdefault("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
sys.path.insert(0, str(Path(__file__).parent.parent))

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

import train_colm  # noqa: E402

original = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp
train_colm.cli(sys.argv[1:])
