"""What a vLLM server of this run's own can do beside vLLM's own calls: take new weights, on the CPU too.

It is loaded by vLLM into its worker processes (``--worker-extension-cls``), which have core-torl installed.
"""

from __future__ import annotations

from typing import Any

NAME = "core_torl.sampler.vllm_worker.WorkerExtension"


class WorkerExtension:
    """Methods that vLLM adds to its workers, to be called by name over HTTP (``/collective_rpc``)."""

    def core_torl_reload(self, folder: str) -> None:
        """Load the safetensors files in ``folder``.

        On the CPU an output layer multiplies by a packed copy of its weights. A reload renews the copy where it loads
        the layer; one that is tied to the embedding loads nothing, and would go on with its first copy.
        """
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        model = worker.get_model()
        head: Any = getattr(model, "lm_head", None)
        tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        if tied and hasattr(head, "quant_method") and worker.device.type == "cpu":
            head.quant_method.process_weights_after_loading(head)
