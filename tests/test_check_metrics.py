"""Do all scores move as they promise, on phantoms? And does the check notice a score that does not?"""

import json

from conftest import run_script, succeeded

from scripts.check_metrics import promises


def test_scores_keep_their_promises_on_phantoms(tmp_path):
    succeeded(run_script("prepare_data.py", "--source", "phantom", "--count", 300, "--image-size", 64, "--folds", 2,
                         "--test-fraction", 0.3, "--output", tmp_path / "data"))
    out = succeeded(run_script("scripts/check_metrics.py", "--real", tmp_path / "data", "--image-size", 64,
                               "--features", "retina", "--lpips", "none", "--output", tmp_path / "check"))
    assert out.count("\nkept    ") == 11 and "BROKEN" not in out

    rows = {row["name"]: row for row in json.loads((tmp_path / "check" / "results.json").read_text())["rows"][1:]}
    assert all(promises(rows).values())
    rows["copies"], rows["independent"] = rows["independent"], rows["copies"]
    broken = [name for name, kept in promises(rows).items() if not kept]
    assert {name.split(":")[0] for name in broken} >= {"GG of copies is strongly negative", "copies"}
