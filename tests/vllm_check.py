#!/usr/bin/env python
"""Load a compressed-tensors checkpoint with the real vLLM on a CPU-only machine.

    python vllm_check.py CHECKPOINT_DIR [MORE_DIRS ...] [--text FILE] [--load-only] [--native-only]

Prints ONE JSON line per directory on stdout (everything else goes to stderr). Several directories
share one process: vLLM is imported once (5-8 s), each checkpoint then takes a few seconds.

    {"mode": "run" | "load-only", "ok": bool, "error": str | null,
     "tokens": [16 greedy ids] | null, "ppl": float | null, ...}

Extra keys: "checkpoint", "stage" (where it failed), "emulated" (layer kinds without a CPU kernel that were
run with dequantised weights), "kernels" (native ones), "warnings", "checked" (tensor counts),
"vllm", "seconds".
Exit code: 0 ok, 1 not ok, 2 wrong usage, 3 vLLM is not installed or not usable here (for a skip).

What is done
  1. vLLM parses config.json, picks the compressed-tensors scheme of every layer and creates its
     parameters (its own code; a stub kernel is offered after all native CPU kernels so that kernel
     selection does not end the load).
  2. vLLM's own loader loads the weights, twice, over two different fill patterns. On top of what
     vLLM asserts itself (names, most shapes) this reports
       - bytes of parameters that no checkpoint tensor filled (vLLM leaves them uninitialised),
       - checkpoint tensors that were ignored or only partly used (vLLM narrows silently),
       - lossy dtype conversions (vLLM's copy_ converts silently).
  3. Layers with a native CPU kernel run with it.  The others are dequantised to the model dtype and run as plain
     layers ("emulated"; activations are NOT quantised there; NVFP4 W4A4 and MXFP8 linears use vLLM's own emulation kernels).
  4. 16 greedy tokens, and with --text exp(mean negative prompt log-probability) over up to 64 windows of 128 tokens.

Packed integers of 3, 5, 6 and 7 bits are dequantised
(vLLM has no kernel and no unpacking for them on a CPU, so the unpacking is this script's, written from the format's text),
and native block FP8 ("quant_method": "fp8") is loaded and, where there is no kernel, dequantised.
"""
import argparse, bisect, gc, json, math, os, re, shutil, sys, tempfile, time, traceback

for k, v in dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",   # engine in this process: exceptions and hooks reach us
    VLLM_CPU_KVCACHE_SPACE="1",           # GiB; otherwise 92 % of the RAM is asked for
    VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1",
    VLLM_CPU_CI_ENV="1",                  # no warm-up
    TORCH_COMPILE_DISABLE="1",            # no C++ compiler needed, no 15 s compile on a cold cache
    VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
).items():
    os.environ.setdefault(k, v)

WIN, NWIN, NTOK = 128, 64, 16


class LoadOnlyDone(Exception):
    pass


class CheckFailed(Exception):
    pass


R = {}


def reset(path):
    R.clear()
    R.update(checkpoint=path, mode="load-only", ok=False, error=None, tokens=None, ppl=None, stage="import",
             emulated=[], kernels=[], warnings=[], checked={})


ARGS = None


def note(key, text):
    if text not in R[key]:
        R[key].append(text)


# ---------------------------------------------------------------- kernel selection
class Stub:
    """Stands for a kernel that the CPU backend lacks. Never computes anything."""
    def __init__(self, *a, **k): pass
    @classmethod
    def is_supported(cls, compute_capability=None): return True, None
    @classmethod
    def can_implement(cls, config): return True, None
    @classmethod
    def get_min_capability(cls): return -1
    def input_quant_key(self): return None
    def process_weights_after_loading(self, layer): raise NotImplementedError("no CPU kernel in vLLM for this layer")
    def apply_weights(self, *a, **k): raise NotImplementedError("no CPU kernel in vLLM for this layer")


def offer_fallbacks():
    """Append fallbacks AFTER every native CPU kernel, so they are only taken if none fits."""
    import importlib
    import vllm.model_executor.kernels.linear as L
    from vllm.platforms import PlatformEnum
    cpu = PlatformEnum.CPU
    # vLLM's own software kernels, which need no GPU but are not listed for the CPU platform
    L.register_linear_kernel(L.EmulationMxfp8LinearKernel, cpu, "mxfp8")
    L.register_linear_kernel(L.EmulationNvFp4LinearKernel, cpu, "nvfp4")
    for kind in ("mp", "int8", "fp8", "mxfp8", "nvfp4", "mxfp4", "mxfp6"):
        L.register_linear_kernel(Stub, cpu, kind)
    for table in ("_POSSIBLE_FP8_BLOCK_KERNELS", "_POSSIBLE_WFP8A16_KERNELS"):   # not covered by register_linear_kernel
        getattr(L, table).setdefault(cpu, []).append(Stub)
    q = "vllm.model_executor.layers.quantization.compressed_tensors."
    # NVFP4 weight-only: vLLM forces Marlin outside of the tables
    m = importlib.import_module(q + "schemes.compressed_tensors_w4a4_nvfp4")
    native = m.init_nvfp4_linear_kernel
    def init_nvfp4(use_a16=False):
        try:
            return native(use_a16=use_a16)
        except ValueError:
            return Stub()
    m.init_nvfp4_linear_kernel = init_nvfp4
    # W4AFP8: the scheme is only picked on compute capability 9.0; pick it here too
    C = importlib.import_module(q + "compressed_tensors").CompressedTensorsConfig
    C._is_fp8_w4a8_sm90 = classmethod(lambda cls, w, i: cls._is_fp8_w4a8(w, i))
    # ... and the ARM int4 kernel says yes to it on the CPU, wrongly
    importlib.import_module(q + "schemes.compressed_tensors_w4a8_fp8").choose_mp_linear_kernel = lambda config: Stub
    # MoE: "no backend" becomes "some backend without experts class"; parameters do not depend on it
    for mod, fn, enum, member in (
        ("w8a8_fp8", "select_fp8_moe_backend", "fp8.Fp8MoeBackend", "TRITON"),
        ("w8a8_mxfp8", "select_mxfp8_moe_backend", "fp8.Fp8MoeBackend", "TRITON"),
        ("w8a8_int8", "select_int8_moe_backend", "int8.Int8MoeBackend", "TRITON"),
        ("wna16", "select_wna16_moe_backend", "int_wna16.WNA16MoEBackend", "TRITON"),
        ("w4a4_nvfp4", "select_nvfp4_moe_backend", "nvfp4.NvFp4MoeBackend", "MARLIN"),
        ("w4a8_fp8", "select_w4a8_moe_backend", "w4a8.W4A8MoeBackend", None),
        ("w4a8_int8", "select_w4a8_int8_moe_backend", "w4a8_int8.W4A8Int8MoeBackend", None),
        ("", "select_fp8_moe_backend", "fp8.Fp8MoeBackend", "TRITON"),     # native block FP8
    ):
        m = importlib.import_module(f"{q}compressed_tensors_moe.compressed_tensors_moe_{mod}" if mod else "vllm.model_executor.layers.quantization.fp8")
        o, e = enum.split(".")
        e = getattr(importlib.import_module("vllm.model_executor.layers.fused_moe.oracle." + o), e)
        default = e[member] if member else list(e)[0]
        def select(*a, _native=getattr(m, fn), _default=default, **k):
            try:
                return _native(*a, **k)
            except (NotImplementedError, ValueError):
                return _default, None
        setattr(m, fn, select)


# ---------------------------------------------------------------- checked loading
def make_loader():
    import torch
    from torch.overrides import TorchFunctionMode
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    U8 = torch.uint8
    WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    DETACH = torch._C.DisableTorchFunctionSubclass

    def raw(p):
        with DETACH():
            d = p.data
            return d.contiguous().reshape(-1).view(U8) if d.numel() else torch.empty(0, dtype=U8)

    def put(p, byts):
        with DETACH():
            if p.data.numel():
                p.data.copy_(byts.view(p.data.dtype).view(p.data.shape))

    class Watch(TorchFunctionMode):
        """Sees every copy_/setitem during loading: which tensor, how much of it, from and to which dtype."""
        def __init__(self):
            super().__init__()
            self.seen, self.used, self.casts, self.now = {}, {}, {}, None
            self.starts, self.by_start = [], {}
        def feed(self, weights):
            for name, t in weights:
                if t.numel():
                    a = t.data_ptr(); bisect.insort(self.starts, a); self.by_start[a] = (name, t.numel() * t.element_size())
                self.seen[name] = t
                self.now = name
                yield name, t
        def owner(self, src):
            a = src.data_ptr(); i = bisect.bisect_right(self.starts, a) - 1
            if i >= 0:
                n, size = self.by_start[self.starts[i]]
                if a < self.starts[i] + size:
                    return n
            return self.now
        def __torch_function__(self, func, types, args=(), kwargs=None):
            dst = src = None
            if func is torch.Tensor.copy_:
                dst, src = args[0], args[1]
            elif func is torch.Tensor.__setitem__ and isinstance(args[2], torch.Tensor):
                dst, src = args[0], args[2]
            if src is not None and self.now is not None:
                n = self.owner(src)
                self.used[n] = self.used.get(n, 0) + src.numel()
                if src.dtype != dst.dtype and not (n or "").endswith("weight_shape"):   # vLLM never reads weight_shape
                    self.casts.setdefault((str(src.dtype), str(dst.dtype), src.dtype in WIDE and dst.dtype in WIDE), []).append(n)
            return func(*args, **(kwargs or {}))

    def compared(n):
        """Loading compares FP8 input scales of experts with the ones they start as, so these must stay; no real scale is 1."""
        return re.search(r"experts\.w(13|2)_input_scale$", n)

    class Loader(DefaultModelLoader):
        def __init__(self, load_config):
            load_config.load_format = "safetensors"
            super().__init__(load_config)

        watch = None

        def get_all_weights(self, model_config, model):
            weights = super().get_all_weights(model_config, model)
            return self.watch.feed(weights) if self.watch else weights

        def load_weights(self, model, model_config):
            R["stage"] = "load"
            params = dict(model.named_parameters())
            orig = {n: raw(p).clone() for n, p in params.items()}
            state = []
            for fill in (0x00, 0xA5):
                for n, p in params.items():
                    if not compared(n):
                        put(p, torch.full_like(orig[n], fill))
                self.watch = Watch()
                with self.watch:
                    super().load_weights(model, model_config)
                state.append({n: raw(p).clone() for n, p in params.items()})
                if set(dict(model.named_parameters())) != set(params):
                    raise CheckFailed("the loader replaced parameters; the two-pass check does not apply")
            errors, optional = [], []
            for n, p in params.items():
                miss = state[0][n] != state[1][n]
                if compared(n) and self.static_inputs(model_config):
                    miss = (state[0][n].view(-1, 4) == orig[n].view(-1, 4)).all(1).repeat_interleave(4)      # float32
                if miss.any():
                    k = int(miss.sum()); put(p, torch.where(miss, orig[n], state[1][n]))
                    may_be_absent = re.search(r"\.attn\.([kvq]_(scale|zero_point)|prob_scale)$", n) or (
                        re.search(r"input(_global)?_scale$", n) and not self.static_inputs(model_config))
                    (optional if may_be_absent else errors).append(f"{n} {list(p.shape)}: {k}/{len(miss)} bytes not filled from the checkpoint")
            w = self.watch
            ignored = sorted(n for n in w.seen if n not in w.used and w.seen[n].numel())
            partly = sorted(n for n in w.used if n in w.seen and w.used[n] < w.seen[n].numel())
            tied = [n for n in ignored if n in ("lm_head.weight", "model.embed_tokens.weight")]
            # GPTQ: vLLM refuses desc_act, without which g_idx says nothing
            hard = [n for n in ignored if n not in tied and not re.search(r"rotary_emb|weight_shape$|\.g_idx$", n)]
            if hard:
                errors.append(f"{len(hard)} checkpoint tensors ignored: " + ", ".join(hard[:6]))
            if partly:
                errors.append(f"{len(partly)} checkpoint tensors used only in part: " + ", ".join(partly[:6]))
            for (a, b, harmless), names in sorted(w.casts.items()):
                text = f"{len(names)} tensors converted {a} -> {b} on load (e.g. {names[0]})".replace("torch.", "")
                note("warnings", text) if harmless else errors.append(text)
            R["checked"] = dict(parameters=len(params), checkpoint_tensors=len(w.seen), optional_not_in_checkpoint=len(optional))
            if errors:
                raise CheckFailed("; ".join(errors[:8]) + (f"; and {len(errors) - 8} more" if len(errors) > 8 else ""))
            self.watch = None
            R["stage"] = "emulate"
            missing = describe_and_emulate(model, do=not (ARGS.load_only or ARGS.native_only))
            if ARGS.load_only or missing:
                raise LoadOnlyDone("no CPU kernel for: " + ", ".join(missing) if missing else "")
            R["stage"] = "process_weights"

        @staticmethod
        def static_inputs(model_config):
            q = getattr(model_config.hf_config, "quantization_config", None) or {}
            return any((g.get("input_activations") or {}).get("dynamic") in (False, "local") for g in q.get("config_groups", {}).values())

    register_model_loader("checked")(Loader)


# ---------------------------------------------------------------- emulation by dequantising
def describe_and_emulate(model, do):
    """Swap layers without a native kernel to plain layers with dequantised weights.
    Returns the kinds of layers that cannot run."""
    import numpy as np, torch
    from torch.nn import Parameter
    from vllm.model_executor.kernels.linear import MPLinearKernel
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.utils.fp8_utils import _upcast_e8m0_to_fp32
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import dequant_mxfp8_to_bf16
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import break_fp4_bytes, dequantize_to_dtype
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    def spread(scale, shape):
        """Repeat a (…, n, k) scale over a (…, N, K) weight: tensor, channel, group or block."""
        scale = scale.to(torch.float32)
        for d in (-2, -1):
            if scale.shape[d] != shape[d]:
                r = -(-shape[d] // scale.shape[d])
                scale = scale.repeat_interleave(r, dim=d).narrow(d, 0, shape[d])
        return scale
    def plain(w, s): return w.to(torch.float32) * spread(s, w.shape)
    def mxfp4(w, s):
        v = break_fp4_bytes(w.reshape(-1, w.shape[-1]), torch.float32).reshape(*w.shape[:-1], -1)
        return v * spread(_upcast_e8m0_to_fp32(s.contiguous()), v.shape)
    def unpack(w, qt, dim):
        if 32 % qt.size_bits == 0:
            return unpack_quantized_values_into_int32(w, qt, dim)
        # a line is one dense little-endian bit stream; here lines are whole words, since 32 values fill size_bits words
        bits = np.unpackbits(w.movedim(dim, -1).contiguous().numpy().astype("<i4").view(np.uint8), axis=-1, bitorder="little")
        v = bits.reshape(*bits.shape[:-1], -1, qt.size_bits).astype(np.int32) @ (1 << np.arange(qt.size_bits, dtype=np.int32))
        return torch.from_numpy(v).movedim(-1, dim)
    def packed(w, s, qt, zp=None):
        v = unpack(w, qt, w.ndim - 1)
        if zp is not None:    # zero points are packed along the output dimension
            z = unpack(zp, qt, w.ndim - 2)
            return (v - spread(z, v.shape)) * spread(s, v.shape)
        return (v - qt.bias) * spread(s, v.shape)

    def linear(l, s):
        c = type(s).__name__
        if c in ("CompressedTensorsW4A4Mxfp4", "CompressedTensorsW4A8Mxfp4"):
            return mxfp4(l.weight_packed.data, l.weight_scale.data)
        if c == "CompressedTensorsW4A4Fp4":   # one global scale for the fused layer: vLLM takes the maximum
            g = l.weight_global_scale.data
            if g.unique().numel() > 1: note("warnings", "NVFP4 global scales differ inside a fused layer (vLLM takes their maximum)")
            return dequantize_to_dtype(l.weight_packed.data, l.weight_scale.data, 1.0 / g.max(), torch.float32, 16, swizzle=False)
        if c == "CompressedTensorsWNA16":
            return packed(l.weight_packed.data, l.weight_scale.data, s.quant_type, None if s.symmetric else l.weight_zero_point.data)
        if c == "CompressedTensorsW4A8Fp8":
            return packed(l.weight_packed.data, l.weight_scale.data, scalar_types.uint4b8)
        if c in ("CompressedTensorsW8A8Fp8", "CompressedTensorsW8A16Fp8", "CompressedTensorsW8A8Int8"):
            sc = l.weight_scale.data
            if s.strategy == "tensor":     # one scale per matrix of the fused layer
                sc = sc.reshape(-1).repeat_interleave(torch.tensor(l.logical_widths)).unsqueeze(1)
            return plain(l.weight.data, sc)

    def experts(l, m):
        c, out = type(m).__name__, {}
        for n in ("w13", "w2"):
            g = lambda k: getattr(l, f"{n}_{k}").data
            if c in ("CompressedTensorsW4A4Mxfp4MoEMethod", "CompressedTensorsW4A8Mxfp4MoEMethod"):
                out[n] = mxfp4(g("weight_packed"), g("weight_scale"))
            elif c == "CompressedTensorsW4A4Nvfp4MoEMethod":
                gs = g("weight_global_scale")
                if gs.ndim == 2:
                    if not torch.equal(gs[:, 0], gs[:, -1]): note("warnings", "NVFP4 MoE: gate and up global scales differ (vLLM takes the gate's)")
                    gs = gs[:, 0]
                out[n] = dequantize_to_dtype(g("weight_packed"), g("weight_scale"), 1.0 / gs, torch.float32, 16, swizzle=False)
            elif c == "CompressedTensorsWNA16MoEMethod":
                out[n] = packed(g("weight_packed"), g("weight_scale"), m.quant_type, None if m.symmetric else g("weight_zero_point"))
            elif c == "CompressedTensorsW4A8Fp8MoEMethod":
                out[n] = packed(g("weight_packed"), g("weight_scale"), scalar_types.uint4b8)
            elif c == "CompressedTensorsW8A8Mxfp8MoEMethod":
                out[n] = dequant_mxfp8_to_bf16(g("weight"), g("weight_scale"))
            elif c == "CompressedTensorsW8A8Fp8MoEMethod" and m.weight_quant.strategy == "tensor":
                s = g("weight_scale"); w = g("weight")
                out[n] = plain(w, s.reshape(s.shape[0], -1, 1))
            elif c == "Fp8MoEMethod":
                out[n] = plain(g("weight"), g("weight_scale_inv"))
            elif c in ("CompressedTensorsW8A8Fp8MoEMethod", "CompressedTensorsW8A8Int8MoEMethod", "CompressedTensorsW4A8Int8MoEMethod"):
                out[n] = plain(g("weight"), g("weight_scale"))
            else:
                return None
        return out

    def swap(layer, new, method, dtype):
        for n in [n for n, _ in layer.named_parameters(recurse=False) if not n.endswith("bias")]:
            delattr(layer, n)
        for n, w in new.items():
            layer.register_parameter(n, Parameter(w.to(dtype).contiguous(), requires_grad=False))
        if isinstance(layer, RoutedExperts):
            layer._replace_quant_method(method)
        else:
            layer.quant_method = method
            layer._input_quant_key = None      # no fused activation quantisation in front of it

    dtype, missing = torch.get_default_dtype(), []
    for name, m in model.named_modules():
        if isinstance(m, RoutedExperts):
            qm = m.quant_method
            if isinstance(qm, UnquantizedFusedMoEMethod): continue
            e = getattr(qm, "experts_cls", None)
            kind = f"experts {type(qm).__name__}"
            if e is not None and "Triton" not in e.__name__ and e._supports_current_device():
                note("kernels", f"{kind}: {e.__name__}"); continue
            new = experts(m, qm) if do else None
            if new is None:
                kind in missing or missing.append(kind); continue
            swap(m, {f"{k}_weight": v for k, v in new.items()}, UnquantizedFusedMoEMethod(m.moe_config), dtype)
            note("emulated", f"{kind}: dequantised weights, activations not quantised")
        elif getattr(m, "scheme", None) is not None:
            s = m.scheme; kind = f"linear {type(s).__name__}"
            ks = [v for v in vars(s).values() if type(v).__module__.startswith("vllm.model_executor.kernels") or isinstance(v, Stub)]
            # per-tensor FP8 in a fused layer: vLLM requantises with an op that the CPU build lacks
            requant = type(s).__name__ == "CompressedTensorsW8A8Fp8" and s.strategy == "tensor"
            if not requant and not any(isinstance(k, Stub) for k in ks):
                for k in ks:
                    note("emulated" if "Emulation" in type(k).__name__ else "kernels", f"{kind}: {type(k).__name__}")
                continue
            w = linear(m, s) if do else None
            if w is None:
                kind in missing or missing.append(kind); continue
            m.scheme = None
            swap(m, {"weight": w}, UnquantizedLinearMethod(), dtype)
            note("emulated", f"{kind}: dequantised weights, activations not quantised")
        elif isinstance(getattr(getattr(m, "quant_method", None), "kernel", None), MPLinearKernel):     # AutoAWQ, GPTQ
            note("kernels", f"linear {type(m.quant_method).__name__}: {type(m.quant_method.kernel).__name__}")
        elif type(getattr(m, "quant_method", None)).__name__ == "Fp8LinearMethod":      # native block FP8
            k, kind = m.quant_method.fp8_linear, "linear Fp8LinearMethod"
            if not isinstance(k, Stub):
                note("kernels", f"{kind}: {type(k).__name__}")
            elif not do:
                kind in missing or missing.append(kind)
            else:
                swap(m, {"weight": plain(m.weight.data, m.weight_scale_inv.data)}, UnquantizedLinearMethod(), dtype)
                note("emulated", f"{kind}: dequantised weights, activations not quantised")
    return missing


# ---------------------------------------------------------------- main
def check(path):
    from vllm import LLM, SamplingParams
    R["stage"] = "construct"
    llm = LLM(path, load_format="checked", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.1,
              max_num_seqs=16, max_num_batched_tokens=1024, enable_prefix_caching=False, seed=0,
              skip_tokenizer_init=not ARGS.text)
    R["stage"] = "run"
    windows = []
    if ARGS.text:
        tok = llm.get_tokenizer()
        ids = tok(open(ARGS.text, encoding="utf-8", errors="replace").read(), add_special_tokens=False)["input_ids"]
        windows = [ids[i:i + WIN] for i in range(0, len(ids) - WIN + 1, WIN)][:NWIN]
        if not windows:
            raise CheckFailed(f"the text has only {len(ids)} tokens")
    vocab = llm.llm_engine.model_config.get_vocab_size()
    start = windows[0][:16] if windows else [(7 * i + 5) % vocab for i in range(16)]
    P = lambda ids: {"prompt_token_ids": ids}
    out = llm.generate([P(start)], SamplingParams(temperature=0, max_tokens=NTOK, ignore_eos=True, detokenize=False), use_tqdm=False)
    R["tokens"] = list(out[0].outputs[0].token_ids)
    if windows:
        out = llm.generate([P(w) for w in windows], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False), use_tqdm=False)
        nll = [-o.prompt_logprobs[i][t].logprob for o in out for i, t in enumerate(o.prompt_token_ids) if i]
        R["ppl"] = round(math.exp(sum(nll) / len(nll)), 5)
        R["windows"] = len(windows)
        if not math.isfinite(R["ppl"]):
            raise CheckFailed("the perplexity is not finite")
    R.update(mode="run", ok=True, stage="done")


def main():
    global ARGS
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoints", nargs="+"); ap.add_argument("--text")
    ap.add_argument("--load-only", action="store_true", help="stop after the checked load")
    ap.add_argument("--native-only", action="store_true", help="no emulation: load-only where vLLM has no CPU kernel")
    ARGS = ap.parse_args()
    out = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)      # vLLM and its C++ parts may write to stdout
    code, t0 = 0, time.time()
    tempfile.tempdir = tempfile.mkdtemp(prefix="vllm_check_")     # vLLM leaves vllm_dist_* files behind
    def leave(code):
        sys.stdout.flush(); sys.stderr.flush(); shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        os._exit(code)                                            # no engine tear-down
    def emit():
        R["seconds"] = round(time.time() - t0, 1)
        out.write(json.dumps(R) + "\n"); out.flush()
    try:
        import vllm
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform
        assert current_platform.is_cpu(), f"this vLLM is not a CPU build ({current_platform})"
        # with zentorch a second model in the same process gave wrong results (it seems to keep prepacked weights by address)
        if len(ARGS.checkpoints) > 1 and current_platform.is_zen_cpu():
            print("zentorch is installed: only one directory per process", file=sys.stderr); leave(2)
        offer_fallbacks()
        make_loader()
    except Exception as e:      # also: another vLLM version that moved what offer_fallbacks() patches
        traceback.print_exc()
        reset(ARGS.checkpoints[0]); R["error"] = f"{type(e).__name__}: {e}"; emit()
        leave(3)
    for path in ARGS.checkpoints:
        reset(path); R["vllm"] = vllm.__version__
        try:
            check(path)
        except LoadOnlyDone as e:
            R.update(ok=True, stage="done")
            if str(e): note("warnings", str(e))
        except Exception as e:
            tb = traceback.extract_tb(e.__traceback__)
            R["error"] = f"{type(e).__name__}: {e}" + ("" if isinstance(e, CheckFailed) else " @ " + " < ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in tb[:-4:-1]))
            traceback.print_exc()
        if not R["ok"]: code = 1
        emit(); t0 = time.time()
        if path != ARGS.checkpoints[-1]:
            gc.collect(); cleanup_dist_env_and_memory()
    leave(code)


if __name__ == "__main__":
    main()
