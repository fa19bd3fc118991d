"""As TensorRT-LLM's llmapi takes it."""

import yaml

from engine import Engine, Option, Told, Words, neutral, preset_options
from specs import NONE, encodes


class TensorRtLlm(Engine):
    kind = "uniform_pair"

    def options(self, table):
        return [Option(NONE, word="auto"), *preset_options(table, "trtllm-", r"dtype: (\w+)")]

    def tell(self, option, assignment, frame, table):
        return Told(["--extra_llm_api_options", "trtllm.yaml"],
                    files={"trtllm.yaml": yaml.safe_dump({"kv_cache_config": {"dtype": option.word}})})

    def read(self, flags, files, table, environment=()):
        words = Words()
        words.add_argument("--extra_llm_api_options")
        said = yaml.safe_load(files[words.parse_args(flags).extra_llm_api_options])
        option = {option.word: option for option in self.options(table)}[said["kv_cache_config"]["dtype"]]
        assignment = [option.pair] * table.layers
        return assignment, neutral(option.frame, encodes(assignment))

    def habits(self, option, assignment, table):
        return ["the scales are those of the checkpoint, or 1", "whether a prompt's own attention reads what is stored is not "
                "documented"] * (option.pair != NONE)


ENGINE = TensorRtLlm("tensorrt-llm")
