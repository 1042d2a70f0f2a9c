"""What starting costs: `python benchmarks/start.py [--quick]`.

Whole processes: `--help`, `recipes`, `plan` and the time to the first training step (from the command to its line in log.jsonl;
a small ResNet on pictures, a small BERT on a CSV), beside what others need for their help: `python -c "import click"`,
`accelerate --help`, `mergekit-yaml --help`; and beside the least that a first step can need: a script that imports the same
libraries, loads the same checkpoint and takes one step. timm's `train.py` is in neither its wheel nor its source archive.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from common import PEERS, ROOT, arguments, interleaved, machine, middle, missing, place, ratio, table, verdict
from made import bert_folder, pictures, text_table, timm_folder

CLI = str(ROOT / "cli.py")
BERT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
LEAST = {
    "timm": """
import sys, torch, timm, datasets, accelerate
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True)
loss = model(torch.randn(32, 3, 64, 64)).sum()
""",
    "bert": """
import sys, torch, datasets, accelerate
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
loss = model(**AutoTokenizer.from_pretrained(sys.argv[1])(["w1 w2 w3"] * 32, return_tensors="pt")).logits.sum()
""",
}
STEP = "optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)\nloss.backward()\noptimizer.step()\n"


def whole(*command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True, capture_output=True)


def first_step(model: Path, data: Path, out: Path) -> Callable[[], object]:
    """From the command to the first line of a step."""
    options = ["--sparse-steps", "1000", "--dense-steps", "0", "--control", "none", "--gate", "none", "--device", "cpu"]
    command = [sys.executable, CLI, str(model), "--data", str(data), "-o", str(out), *options, "--batch-size", "32", "--quiet"]
    partial = out.with_name(out.name + ".partial")

    def run() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        log = partial / "log.jsonl"
        while not (log.is_file() and '"step"' in log.read_text()):
            if child.poll() is not None:
                sys.exit(f"it ended before its first step: {child.stderr.read().decode() if child.stderr else ''}")
            time.sleep(0.005)
        child.kill()
        child.wait()

    return run


def ways(folder: Path) -> dict[str, Callable[[], object]]:
    python = sys.executable
    found = {
        "import click": whole(python, "-c", "import click"),
        "--help": whole(python, CLI, "--help"),
        "recipes": whole(python, CLI, "recipes"),
        "accelerate --help": whole(str(Path(python).parent / "accelerate"), "--help"),
    }
    if (PEERS / "bin/mergekit-yaml").is_file():
        found["mergekit-yaml --help"] = whole(str(PEERS / "bin/mergekit-yaml"), "--help")
    pictures(folder / "pictures/train", 400, 64)
    pictures(folder / "pictures/test", 100, 64, seed=1)
    sources = {
        "timm": (timm_folder(folder / "timm", "resnet18", 10, 64), folder / "pictures"),
        "bert": (bert_folder(folder / "bert", 32, **BERT), text_table(folder / "texts.csv", 400, 20)),
    }
    for kind, (model, data) in sources.items():
        found[f"plan, {kind}"] = whole(python, CLI, "plan", str(model), "--data", str(data))
        found[f"first step, {kind}"] = first_step(model, data, folder / f"out-{kind}")
        found[f"the least, {kind}"] = whole(python, "-c", LEAST[kind] + STEP, str(model))
    return found


def main() -> None:
    given = arguments(__doc__, 7)
    print(machine())
    with place() as folder:
        timed = ways(folder)
        times = interleaved(timed, given.rounds)
    least = {f"first step, {kind}": f"the least, {kind}" for kind in LEAST}
    rows = []
    for name in timed:
        over = ratio(times, name, least[name]) if name in least else ""
        rows.append([name, f"{median(times[name]):.2f}", ratio(times, name, "import click"), over])
    if "mergekit-yaml --help" not in timed:
        rows.append([f"mergekit-yaml: {missing('mergekit')}", "", "", ""])
    table("Processes from their start", ["", "seconds", "/ import click", "/ the least"], rows)
    verdict("--help / import click", middle(times, "--help", "import click"), 1.5)
    verdict("recipes / import click", middle(times, "recipes", "import click"), 4.0)


if __name__ == "__main__":
    sys.exit(main())
