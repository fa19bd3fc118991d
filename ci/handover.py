"""From a spec, or a plan with a scheme for each layer, to the nearest setting that an engine can take today: its own flags,
files or lines of Python, the spec that this amounts to, and in plain sentences what it cannot say or does otherwise.

ENGINES has the engines, a file of ci/engines each; load asks kvqbench what they need to know of a model.
"""

import importlib
import itertools
import json
import os
import pkgutil
import shlex
import subprocess

import writing
from specs import Refused, Table, parse_presets, parse_schemes, parse_spec

HERE = os.path.dirname(os.path.abspath(__file__))
KVQBENCH = os.environ.get("KVQ_BENCH_EXE", os.path.join(os.path.dirname(HERE), "build", "release", "kvqbench"))
ENGINES = {engine.name: engine for engine in (importlib.import_module(f"engines.{found.name}").ENGINE for found in
                                              pkgutil.iter_modules([os.path.join(HERE, "engines")]))}


def kvqbench(*arguments):
    """What it prints; its own line where it refuses."""
    try:
        done = subprocess.run([KVQBENCH, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Refused(f"{KVQBENCH}: {error.strerror}; build it (ci/build release kvqbench)") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it failed and said nothing"]
        raise Refused(lines[-1].removeprefix("kvqbench: "))
    return done.stdout


def spec_of(name):
    """Of a benchmark's name."""
    return name.split("/ctx:")[0].rsplit("/", 1)[1]


def load(model, specs=()):
    """The table of a model, as kvqbench's --models names it, with the schemes of all engines and those of the specs, which
    kvqbench judges first."""
    presets = parse_presets(kvqbench("--list-presets", f"--models={model}"))
    run = ["--benchmark_filter=^kv_size/", f"--models={model}", "--benchmark_format=json"]
    context = json.loads(kvqbench(*run, "--schemes=" + ",".join(["none", *specs]), "--contexts=128"))["context"]
    shape = json.loads(next(value for key, value in context.items() if key.startswith("model_config ")))
    kept, layers = tuple(shape.get("kv_layers", ())), shape["num_layers"]
    table = Table(len(kept) or layers, shape["head_dim"], shape["num_kv_heads"], presets, {}, {}, rotary_dim=shape.get("rotary_dim", 0),
                  kv_layers=kept, model_layers=layers)
    table.schemes = parse_schemes(kvqbench("--help"), table.widths)
    if os.path.isfile(os.path.join(model, "config.json")):
        table.directory = model
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            table.model_type = json.load(file).get("model_type", "")
    pairs = {pair for engine in ENGINES.values() if not engine.unknown(table) for pair in engine.pairs(table)}
    for spec in specs:
        pairs |= set(parse_spec(spec, table.layers, presets, table.latent)[0])
    wanted = {}  # a spec with one side encoded: its bits are that side's
    for pair in pairs:
        for side, scheme in enumerate(pair):
            if scheme != "none":
                wanted[f"none+{scheme}" if side else f"{scheme}+none"] = (side, scheme)
    sized = json.loads(kvqbench(*run, "--schemes=" + ",".join(sorted(wanted)), "--contexts=1024"))["benchmarks"]
    table.bits = {wanted[spec_of(cell["name"])]: cell["encoded_bits_per_element"] for cell in sized}
    table.bits |= {(0, "none"): 16.0, (1, "none"): 16.0}
    return table


def described(table):
    """The cache of a model, in words."""
    layers = f"{table.layers} layers"
    if table.kv_layers:
        layers += f" of the model's {table.model_layers} keep tokens ({', '.join(map(str, table.kv_layers))}; counted from 0 as the cache's)"
    return layers + (f", a latent of {table.head_dim} and a rotary key of {table.rotary_dim} channels" if table.latent else
                     f", {table.kv_heads} KV heads of {table.head_dim}")


def amax_of(values):
    """Of the numbers of a `distribution` cell (results.Cell.values): of each layer the largest |key| and |value|."""
    found = []
    for layer in itertools.count():
        ends = [[values.get(f"distribution.{end}_{side}/layer:{layer}") for end in ("min", "max")] for side in "kv"]
        if None in ends[0] + ends[1]:
            return found
        found.append(tuple(max(abs(low), abs(high)) for low, high in ends))


def written(projection, out):
    """Writes its files to a folder of `out` that has the engine's name; what the engine is to be told, and what is lost, in
    lines."""
    lines = [f"{projection.engine}: {projection.spec}" + (", as asked" if projection.exact else "")]
    words = [f"{name}={value}" for name, value in projection.environment.items()] + [shlex.join(projection.flags)]
    lines += ["  " + " ".join(words)] * any(words) + ["  >>> " + line for line in projection.snippet.splitlines()]
    for name, text in projection.files.items():
        os.makedirs(os.path.join(out, projection.engine), exist_ok=True)
        writing.write(os.path.join(out, projection.engine, name), text)
        lines.append("  wrote " + os.path.join(out, projection.engine, name))
    return "\n".join(lines + ["  - " + sentence for sentence in projection.lost])
