"""What tests of this folder share: where things are, commands as modules, a tiny model, and a folder for a class."""

import contextlib
import csv
import importlib.machinery
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

import tiny_models

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
BASELINES = os.path.join(HERE, "baselines")
STUDY = os.path.join(os.environ.get("KVQ_SHARED") or os.path.join(ROOT, "..", "shared"), "reference-study", "data")
KVQBENCH = os.environ.get("KVQ_BENCH_EXE") or os.path.join(ROOT, "build", "release", "kvqbench")
AXE = os.path.join(CACHE, "downloads", "axe_playwright_python-0.1.8-py3-none-any.whl")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def load(name):
    """A command, whose name has no .py, as a module."""
    sys.dont_write_bytecode = True  # it would lie beside the command, under a name that git does not ignore
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_") + "_command", os.path.join(HERE, name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def run(command, *arguments):
    """Exit code, stdout, stderr of a command that was loaded."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command.main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def report(*arguments):
    return subprocess.run([os.path.join(HERE, "report"), *arguments], capture_output=True, text=True)


def read(*parts):
    with open(os.path.join(*parts), encoding="utf-8", newline="") as file:
        return file.read()


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


class Once:
    """Made once for all tests of a class, and removed after them."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="kvq_report_")
        try:
            cls.make()
        except BaseException:
            shutil.rmtree(cls.folder)
            raise

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)


class OnPage:
    """What one does with the table of a page that is open in self.browser."""

    def column(self, name):
        return self.browser.run(
            "(() => { const heads = [...document.querySelectorAll('#results thead th')];"
            f"const at = heads.findIndex(h => h.textContent.trim() === {name!r});"
            "return [...document.querySelectorAll('#results tbody tr')].filter(r => !r.hidden)"
            ".map(r => r.cells[at].textContent); })()")

    def choose(self, name, value):
        self.browser.run(f"(() => {{ const s = document.querySelector('[data-filter={name}]'); s.value = {value!r};"
                         "s.dispatchEvent(new Event('change')); })()")


def violations(browser, scope="document"):
    """What axe-core finds in the page against accessibility."""
    with zipfile.ZipFile(AXE) as wheel:
        browser.run(wheel.read("axe_playwright_python/axe.min.js").decode() + ";0")
    return browser.run(f"axe.run({scope}, {{resultTypes: ['violations']}})"
                       ".then(r => r.violations.map(v => v.id + ': ' + v.help + ' ' + v.nodes[0].html))")


def write_model(folder):
    """A Llama of two layers with heads of 64 and random weights, and the tokenizer of the parity tests."""
    shutil.copytree(os.path.join(ROOT, "accuracy", "golden", "tokenizer"), folder)
    config = json.loads(read(ROOT, "accuracy", "golden", "models", "llama-mha", "config.json"))
    config.update(hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
                  max_position_embeddings=1024)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    shapes = {"model.embed_tokens": [420, 64], "lm_head": [420, 64], "model.norm": [64]}
    for layer in range(2):
        for name, shape in {"self_attn.q_proj": [128, 64], "self_attn.k_proj": [64, 64], "self_attn.v_proj": [64, 64],
                            "self_attn.o_proj": [64, 128], "mlp.gate_proj": [48, 64], "mlp.up_proj": [48, 64],
                            "mlp.down_proj": [64, 48], "input_layernorm": [64], "post_attention_layernorm": [64]}.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    tiny_models.write_tensors(os.path.join(folder, "model.safetensors"), {name + ".weight": shape for name, shape in shapes.items()},
                              np.random.default_rng(1))
    return sum(math.prod(shape) for shape in shapes.values())
