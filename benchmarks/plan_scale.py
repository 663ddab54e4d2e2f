"""How long a plan of 100,000 tensors takes, and how much memory.

    python benchmarks/plan_scale.py [--profile SCHEME]

The checkpoint is headers and holes: 86 layers of 384 experts in 200 shards, 1.7 TB if they were there.
"""

import argparse
import cProfile
import json
import pstats
import shutil
import statistics
import tempfile
from pathlib import Path

from measure import MEGABYTE, measure_ok, streamquant_command
from synthetic import mixture, write_checkpoint

import streamquant

NUM_LAYERS, NUM_EXPERTS, NUM_SHARDS = 86, 384, 200
GOAL_SECONDS, GOAL_BYTES = 5.0, 500e6
RECIPE = """
ignore = ["model.layers.0", "*.layers.85.mlp.experts.*"]

[[rule]]
match = "*.mlp.experts.*"
scheme = "NVFP4A16"

[[rule]]
match = ["*.mlp.shared_experts.*", "re:.*layers[.][1-4][.]self_attn[.][qkv]_proj"]
scheme = "FP8_BLOCK"

[[rule]]
match = "re:.*self_attn.*_proj"
scheme = "FP8_DYNAMIC"
"""


def main() -> None:
    """Measure, or profile one scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoint is made (a few MB)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", metavar="SCHEME", help="a preset or 'recipe': print where the time goes instead")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plan-scale-", dir=arguments.folder))
    try:
        source, recipe = folder / "source", folder / "recipe.toml"
        recipe.write_text(RECIPE)
        tensors, config = mixture(NUM_LAYERS, NUM_EXPERTS)
        shard_bytes = sum(tensor.num_bytes for tensor in tensors) // NUM_SHARDS + 4 * 2**20  # a shard ends short of it by half a tensor
        write_checkpoint(source, tensors, config, shard_bytes=shard_bytes, sparse=True)
        if arguments.profile is not None:
            profile(source, {"recipe": recipe} if arguments.profile == "recipe" else {"scheme": arguments.profile})
            return
        print(f"{len(tensors):,} tensors in {len(list(source.glob('*.safetensors')))} shards; goal: 5 s, 500 MB\n")
        print("| `streamquant plan --json` | seconds | CPU seconds | peak RSS | peak anonymous | JSON | goal |")
        print("|---|---|---|---|---|---|---|")
        cases = {
            "NVFP4A16": ["--scheme", "NVFP4A16"],
            "FP8_DYNAMIC": ["--scheme", "FP8_DYNAMIC"],
            "recipe of 6 patterns": ["--recipe", str(recipe)],
        }
        for name, options in cases.items():
            runs = [
                measure_ok(streamquant_command("plan", str(source), "--json", *options), log=folder / "plan.json")
                for _ in range(arguments.repeats)
            ]
            seconds = statistics.median(run.seconds for run in runs)
            cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
            peak_rss = max(run.peak_rss for run in runs)
            peak_anonymous = max(run.peak_anonymous for run in runs)
            json_bytes = (folder / "plan.json").stat().st_size
            json.loads((folder / "plan.json").read_bytes())
            met = "met" if seconds <= GOAL_SECONDS and peak_rss <= GOAL_BYTES else "missed"
            memory = " | ".join(f"{num_bytes / MEGABYTE:.0f} MB" for num_bytes in (peak_rss, peak_anonymous, json_bytes))
            print(f"| {name} | {seconds:.1f} | {cpu_seconds:.1f} | {memory} | {met} |", flush=True)
    finally:
        shutil.rmtree(folder)


def profile(source: Path, options: dict[str, str | Path]) -> None:
    """Print the functions in which making a plan and turning it into JSON spend their time."""
    profiler = cProfile.Profile()
    with profiler:
        plan = streamquant.plan(source, **options)  # type: ignore[arg-type]
        json.dumps(plan.to_json(), indent=2)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
