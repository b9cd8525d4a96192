"""Time and memory of a forward pass of the whole backbone, measured in a separate process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
from pathlib import Path
import numpy as np
import dat_ref

config = dat_ref.config("dat_tiny")
model = dat_ref.DAT(config, dat_ref.init_params(config, seed=0))
image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
logits = model(image)
# Not getrusage: its maximum survives exec, so that it would count the process that started this one.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"peak": peak, "shape": logits.shape, "finite": bool(np.isfinite(logits).all())}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_dat_tiny_at_224_takes_under_2_gib():
    """The whole process, parameters and imports included, stays under 2 GiB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["shape"] == [1, 1000]
    assert found["finite"]
    assert found["peak"] < 2 * 2**30
