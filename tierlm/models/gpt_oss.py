"""gpt-oss, after `GptOssForCausalLM` in transformers. No torch."""

from __future__ import annotations

from tierlm.models.config_reader import GLOBAL, LOCAL, Config
from tierlm.models.family import Names
from tierlm.spec import LayerSpec, ModelSpec, Moe, RouterSpec


class GptOss(Names):
    """Grouped attention with sinks and, in every other layer, a window; clamped experts with biases in every layer.

    GGUF files have gate and up projections apart. Published safetensors files have them in one matrix, in MXFP4;
    without quantisation, matrices are transposed.
    """

    router = "router."
    router_bias = "router.bias"

    def read_spec(self, config: Config) -> ModelSpec:
        config.allow(swiglu_limit=(7.0,), swiglu_alpha=(1.702,))  # kernels/linear.py
        full, windowed = (
            config.grouped(
                config.rope(interleaved=False, theta=150000.0),
                bias=True,
                output_bias=True,
                sinks=True,
                window=window,
            )
            for window in (None, config.number("sliding_window", default=128))
        )
        stacked = not config.flag("experts_split", False)
        plain = not config.part("quantization_config").fields
        moe = Moe(
            experts=config.number("num_local_experts", "num_experts"),
            experts_per_token=config.number("num_experts_per_tok", "experts_per_token"),
            width=config.number("intermediate_size"),
            shared_width=0,
            router=RouterSpec("softmax", bias=True),
            clamped=True,
            stacked=stacked,
            transposed=stacked and config.flag("experts_transposed", plain),  # packing.py
        )
        layers = config.number("num_hidden_layers")
        usual = ([LOCAL, GLOBAL] * layers)[:layers]
        stack = (LayerSpec(windowed if local else full, moe) for local in config.windowed(usual))
        return config.model(tuple(stack), 1e-5)
