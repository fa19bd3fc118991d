#!/usr/bin/env python3
"""Makes the golden files of the model families: tiny random models by transformers, what they compute, and what
transformers knows of the family.

usage: make_golden_models.py [--check] [FAMILY...]

For every family (accuracy/families/FAMILY.json: its model_type and the tiny models, by the arguments of transformers'
config class) writes accuracy/golden/models/<case>/{config.json,model.safetensors} and accuracy/golden/families/FAMILY.json: what
the models compute, what the config class has where a config.json says nothing, and how many parameters the published
shapes of fixtures/architectures/ have. With --check makes them anew and compares (golden_files.py). Packages:
accuracy/requirements.txt.
"""

import glob
import json
import os
import re
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

import golden_files
from golden_files import short

VOCAB, TOKENS, GREEDY = 61, 40, 64
SLIDING = "sliding_attention"
IDS = [(i * i * 7 + 3 * i + 5) % VOCAB for i in range(TOKENS)]
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
HERE = os.path.dirname(os.path.abspath(__file__))


def rope(**extra):
    return dict(rope_parameters=dict(rope_theta=1000.0, **extra))


def classes(model_type):
    """The config class and the model class."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


LLAMA, QWEN2, QWEN3, GEMMA3 = (classes(of) for of in ("llama", "qwen2", "qwen3", "gemma3_text"))


def families():
    """What accuracy/families/ says, by its files' names."""
    result = {}
    for path in sorted(glob.glob(os.path.join(HERE, "families", "*.json"))):
        with open(path, encoding="utf-8") as file:
            result[os.path.basename(path).removesuffix(".json")] = json.load(file)
    return result


# Of each tiny model: config class, model class, the config's arguments.
CASES = {name: (*classes(family["model_type"]), {**family["config"], **case["config"]})
         for family in families().values() for name, case in family["cases"].items() if "config" in case}


def repair_deepseek_v2(model):
    """What transformers 5.5.4 lacks there: the scale of scores that yarn's mscale_all_dim asks for (pull request 47435, which
    moves it there from deepseek_v3), and an attribute without which choosing experts by groups fails."""
    config = model.config
    rope = config.rope_parameters
    for layer in model.model.layers:
        if rope.get("mscale_all_dim"):
            layer.self_attn.scaling *= yarn_get_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
        layer.mlp.num_experts = config.n_routed_experts


def make(config_class, model_class, arguments):
    """A random model in which nothing is as it would be if it were left out: no norm of one, no bias of zero."""
    torch.manual_seed(7)
    config = config_class(initializer_range=0.3, **arguments)
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # sdpa, the default, leaves the cap out
    model = model_class(config).eval()
    if config.model_type == "deepseek_v2":
        repair_deepseek_v2(model)
    with torch.no_grad():
        for name, value in list(model.named_parameters()) + list(model.named_buffers()):
            if name.endswith("layer_scalar"):
                value.uniform_(0.6, 1.1)
            elif name.endswith("bias"):
                value.normal_(0, 0.3)
            elif name.endswith("sinks"):
                value.normal_(0, 1)
            elif name.endswith("A_log"):
                value.uniform_(-2, 1)  # some heads forget within a few tokens, some keep a text
            elif name.endswith("experts.gate_up_proj"):
                value.mul_(3)  # some gates reach a limit of 7
            elif "norm" in name or ".ln_" in name:  # around one, or where the family adds one to it, zero
                value.uniform_(value.mean() - 0.5, value.mean() + 0.5)
        for value in model.state_dict().values():  # bfloat16 halves the files and loses nothing
            if value.is_floating_point() and value.dim() > 0:
                value.copy_(value.to(torch.bfloat16))
    return model


def save(model, target):
    """As files are published: transformers itself may hold weights in other pieces."""
    model.config.save_pretrained(target)  # before it names its weights' type
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = {name: value.to(torch.bfloat16).contiguous()
                   for name, value in load_file(os.path.join(folder, "model.safetensors")).items() if value.dim() > 0}
    save_file(tensors, os.path.join(target, "model.safetensors"), {"format": "pt"})


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def mxfp4(weights):
    """Blocks and scales of experts [experts, in, out], as gpt-oss is published: OCP Microscaling Formats v1.0, 6.3."""
    blocks = weights.float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, in / 32, 32]
    exponent = blocks.abs().amax(-1).log2().floor() - 2  # 4 is the largest power of two that an element can be
    scaled = blocks / torch.exp2(exponent).unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)


def quantize(target, model_class):
    """The experts of the model in `target` become MXFP4; returns what transformers reads from it."""
    path = os.path.join(target, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    with open(path, "w", encoding="utf-8") as out:
        json.dump(config, out, indent=2)
        out.write("\n")
    path = os.path.join(target, "model.safetensors")
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[name + "_blocks"], tensors[name + "_scales"] = mxfp4(tensors.pop(name))
    save_file(tensors, path, {"format": "pt"})
    return model_class.from_pretrained(target).float().eval()  # it decodes them in bfloat16, in which they are exact


def wrap(source, target, prefix):
    """The same model as the text half of a multimodal one: config.json one deeper, weights behind a prefix, or as Gemma's."""
    os.makedirs(target, exist_ok=True)
    with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(target, "config.json"), "w", encoding="utf-8") as out:
        json.dump({"model_type": config["model_type"].removesuffix("_text"), "text_config": config}, out, indent=1)
        out.write("\n")
    tensors = {prefix + name if prefix else name.replace("model.", "model.language_model.", 1): value
               for name, value in load_file(os.path.join(source, "model.safetensors")).items()}
    save_file(tensors, os.path.join(target, "model.safetensors"), {"format": "pt"})


def computed(model):
    positions = [0, 1, 17, TOKENS - 1]
    with torch.no_grad():
        # Without a config it keeps every token of sliding layers, too, and knows no layers of another kind.
        linear = "linear_attention" in (getattr(model.config, "layer_types", None) or [])
        cache = DynamicCache(config=model.config) if linear else DynamicCache()
        logits = model(torch.tensor([IDS]), past_key_values=cache, use_cache=True).logits[0]
        longer, closest = list(IDS), 1.0
        for _ in range(GREEDY):  # by hand: generate() would mask what it takes for padding
            last = model(torch.tensor([longer])).logits[0, -1]
            top = last.topk(2).values
            closest = min(closest, ((top[0] - top[1]) / last.norm()).item())
            longer.append(int(last.argmax()))
    assert closest > 1e-5, f"two tokens are nearly as likely ({closest}): take another seed"
    layers = [{"keys": [short(x) for x in layer.keys.reshape(-1)[::13]],
               "values": [short(x) for x in layer.values.reshape(-1)[::13]]} for layer in cache.layers if hasattr(layer, "keys")]
    return {"ids": IDS, "positions": positions, "logits": [[short(x) for x in logits[i, :VOCAB]] for i in positions],
            "greedy": longer[TOKENS:], "cache": layers}


def defaults(model_type):
    """What the config class has where a config.json leaves everything out."""
    config = CONFIG_MAPPING[model_type]()
    config = getattr(config, "text_config", config)
    types, ropes = getattr(config, "layer_types", None), getattr(config, "rope_parameters", None) or {}
    heads = config.num_attention_heads
    slides = types is None or types[0] == SLIDING
    first_is_dense = (getattr(config, "first_k_dense_replace", 0) > 0
                      or (getattr(config, "mlp_layer_types", None) or [""])[0] == "dense")
    return {"hidden_size": config.hidden_size, "layers": config.num_hidden_layers, "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", heads),
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "vocabulary": config.vocab_size, "positions": config.max_position_embeddings,
            "norm_eps": getattr(config, "rms_norm_eps", getattr(config, "layer_norm_epsilon", None)),
            "tied": config.tie_word_embeddings,
            # Of the first layer.
            "intermediate_size": ((None if first_is_dense else getattr(config, "moe_intermediate_size", None))
                                  or getattr(config, "intermediate_size", 4 * config.hidden_size)),
            "window": (getattr(config, "sliding_window", None) or 0) if slides else 0,
            "rope_theta": ropes.get(types[0] if types else None, ropes).get("rope_theta", 0.0)}


def published():
    """Name and config.json of the shapes that fixtures/architectures/ knows."""
    row = re.compile(r'RegisterShape \w+\{\{"([^"]+)", "[^"]+", R"\((.*?)\)"\}\}', re.DOTALL)
    for path in sorted(glob.glob(os.path.join(HERE, "..", "fixtures", "architectures", "*.cc"))):
        with open(path, encoding="utf-8") as file:
            for name, text in row.findall(file.read()):
                yield name, json.loads(text)


def parameters(model_type):
    """Of the published shapes of a family."""
    result = {}
    for name, config in published():
        if config["model_type"] != model_type:
            continue
        config_class, model_class = classes(model_type)
        with torch.device("meta"):
            model = model_class(config_class.from_dict(config))
        result[name] = sum(value.numel() for value in model.parameters())
    return result


def main(arguments):
    known = families()
    check, wanted = "--check" in arguments, [one for one in arguments if one != "--check"]
    if not set(wanted) <= set(known):
        print(__doc__.strip())
        return 2
    torch.set_num_threads(1)
    made = {}
    with golden_files.folder(check) as folder:
        for family in wanted or known:
            cases, types = {}, {known[family]["model_type"]}
            for name, case in known[family]["cases"].items():
                target = os.path.join(folder, "models", name)
                if "wraps" in case:
                    types.add(known[family]["model_type"].removesuffix("_text"))
                    cases[name] = cases[case["wraps"]]
                    if not check:
                        wrap(os.path.join(folder, "models", case["wraps"]), target, case.get("prefix", ""))
                    continue
                model = make(*CASES[name])
                if not check or "experts" in case:
                    save(model, target)
                if "experts" in case:  # stored otherwise than transformers saves them
                    model = quantize(target, CASES[name][1])
                cases[name] = computed(model)
            made[f"families/{family}.json"] = {
                "cases": cases, "defaults": {one: defaults(one) for one in sorted(types)},
                "parameters": parameters(known[family]["model_type"])}
        return golden_files.write_or_check(made, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
