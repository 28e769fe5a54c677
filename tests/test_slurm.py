"""The scripts of scripts/slurm on a real Slurm, where there is one: stopped, requeued, continued, the same files."""

import os
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT

from scripts.slurm import same_files

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where daemons are
NEEDED = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch")
MISSING = [name for name in NEEDED if not shutil.which(name, path=PATH)]


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=f"no {' '.join(MISSING)}: needs Slurm and munge (Debian: slurm-wlm munge)")
@pytest.mark.parametrize("part", ["array", "time_limit", "multinode"])
def test_stopped_jobs_are_requeued_and_end_with_the_same_files(part):
    done = subprocess.run([ROOT / "scripts" / "slurm" / "test_cluster.sh", part], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if part != "time_limit":
        assert "files are the same" in done.stdout


def test_files_are_compared_bit_by_bit(tmp_path):
    for name, weight, minutes in (("one", 1.0, 1), ("other", 1.0, 2), ("third", 1.0 + 2**-20, 1)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "000000.png").write_bytes(b"image")
        (tmp_path / name / "log.txt").write_text(f"{minutes} minutes")
        torch.save({"net": {"w": torch.tensor([weight])}, "minutes": minutes, "step": 3},
                   tmp_path / name / "checkpoints" / "last_ckpt.pt")

    def differences(*names):
        return same_files.differences(*(tmp_path / name for name in names))

    assert differences("one", "other") == []
    assert differences("one", "third") == ["differs: checkpoints/last_ckpt.pt"]
    (tmp_path / "other" / "000000.png").write_bytes(b"Image")
    (tmp_path / "one" / "grid.png").touch()
    assert differences("one", "other") == [f"only in {tmp_path / 'one'}: grid.png", "differs: 000000.png"]
