"""Single operations of ggml, llama.cpp's tensor library, from the shared library in xllamacpp's wheel."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from tierlm.formats.ggml import GGML

TYPES = {type.name: type.value for type in GGMLQuantizationType}
BLOCKS = {"BF16": (1, 2), **{format.dtype: (format.block[1], format.block_bytes) for format in GGML}}  # values, bytes
REPACK = "_Z35ggml_backend_cpu_repack_buffer_typev"  # a C++ function: its buffers repack Q4_0 for the processor

POINTERS = (
    "init new_tensor_3d mul_mat_id mul silu new_graph backend_cpu_init backend_alloc_ctx_tensors "
    "backend_alloc_ctx_tensors_from_buft mul_mat get_data"
)


class Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The library, and a CPU backend with a number of threads."""

    def __init__(self, threads: int):
        found = importlib.util.find_spec("xllamacpp")
        if found is None or found.origin is None:
            raise SystemExit("xllamacpp is not installed: pip install 'tierlm[peers]'")
        self.library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
        for name in POINTERS.split():
            self._function(name).restype = ctypes.c_void_p
        getattr(self.library, REPACK).restype = ctypes.c_void_p
        self._function("quantize_chunk").restype = ctypes.c_size_t
        self._function("init").argtypes = [Parameters]
        self.buffers: list[int] = []
        self.backend = self.call("backend_cpu_init")
        self.call("backend_cpu_set_n_threads", self.backend, ctypes.c_int(threads))

    def _function(self, name: str) -> ctypes._CFuncPtr:
        function: ctypes._CFuncPtr = getattr(self.library, f"ggml_{name}")
        return function

    def call(self, name: str, *values: object) -> int:
        return self._function(name)(*[ctypes.c_void_p(v) if isinstance(v, int) else v for v in values])  # type: ignore[no-any-return]

    def context(self) -> int:
        return self._function("init")(Parameters(2**20, None, True))  # type: ignore[no-any-return]

    def tensor(self, context: int, type: str, *shape: int) -> int:
        """``shape``: the innermost dimension first, at most three."""
        sizes = [ctypes.c_int64(size) for size in (*shape, 1, 1)[:3]]
        return self.call("new_tensor_3d", context, ctypes.c_int(TYPES[type]), *sizes)

    def quantised(self, type: str, values: torch.Tensor) -> np.ndarray:
        """float32 [outs, ins] -> the bytes in one of the types."""
        outs, ins = values.shape
        per, size = BLOCKS[type]
        data = np.empty(outs * ins // per * size, np.uint8)
        sizes = [ctypes.c_int64(n) for n in (0, outs, ins)]
        number = ctypes.c_int(TYPES[type])
        self.call("quantize_chunk", number, values.data_ptr(), data.ctypes.data, *sizes, None)
        return data

    def weights(self, type: str, matrix: torch.Tensor, copies: int, repacked: bool) -> int:
        """A tensor [copies, outs, ins] of one float32 matrix repeated, repacked for the processor on request."""
        outs, ins = matrix.shape
        context = self.context()
        tensor = self.tensor(context, type, ins, outs, copies)
        if repacked:
            place = getattr(self.library, REPACK)()
            self.buffers.append(self.call("backend_alloc_ctx_tensors_from_buft", context, place))
        else:
            self.buffers.append(self.call("backend_alloc_ctx_tensors", context, self.backend))
        data = np.tile(self.quantised(type, matrix), copies)
        self.set(tensor, data)
        return tensor

    def set(self, tensor: int, data: np.ndarray) -> None:
        """Set all bytes of a tensor."""
        self.call("backend_tensor_set", tensor, data.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(data.nbytes))

    def get(self, tensor: int, *shape: int) -> torch.Tensor:
        """A float32 tensor; ``shape``: the outermost dimension first."""
        data = torch.empty(shape)
        self.call("backend_tensor_get", tensor, data.data_ptr(), ctypes.c_size_t(0), ctypes.c_size_t(data.nbytes))
        return data

    def graph(self, context: int, result: int) -> int:
        """The graph for ``compute`` of ``result``, a tensor made by operations in ``context``."""
        self.buffers.append(self.call("backend_alloc_ctx_tensors", context, self.backend))
        graph = self.call("new_graph", context)
        self.call("build_forward_expand", graph, result)
        return graph

    def compute(self, graph: int) -> None:
        self.call("backend_graph_compute", self.backend, graph)

    def release(self) -> None:
        """Free the memory of all tensors."""
        while self.buffers:
            self.call("backend_buffer_free", self.buffers.pop())
