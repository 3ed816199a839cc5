import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in subprocesses: threads that wait for a busy core cost minutes

import pytest  # noqa: E402
import torch._dynamo.config as dynamo_config  # noqa: E402
import torch._functorch.config as functorch_config  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def eager_again():
    """Undo what --compile sets for the whole process."""
    yield
    functorch_config.activation_memory_budget, inductor_config.fallback_random = 1.0, False
    dynamo_config.specialize_float = False
