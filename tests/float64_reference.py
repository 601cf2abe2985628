"""The decoder again, in NumPy and float64: one sequence, layer after layer, the whole text at once.

Written from the definitions, to say which side is off where two float32 programs differ.
"""

import jax
import numpy as np
import scipy.special

ACTIVATIONS = {
    "silu": lambda x: x * scipy.special.expit(x),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: x * scipy.special.expit(2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


def forward(cfg, params, tokens):
    """Logits [T, V] of tokens [T]."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = params["embedding"][np.asarray(tokens)] * cfg.embed_scale
    for loop in range(cfg.num_loops):
        for layer in range(cfg.num_layers):
            x = Layer(cfg, params, loop, layer).run(x)
    x = norm(cfg, x, params["final_norm"], loop=0)
    logits = x @ (params["embedding"].T if cfg.tied_head else params["head"])
    return softcap(logits, cfg.final_softcap)


class Layer:
    """A layer of the block at one loop; params in float64."""

    def __init__(self, cfg, params, loop, layer):
        self.cfg, self.loop = cfg, loop
        self.params = jax.tree.map(lambda a: a[layer], params["block"])
        depth = loop * cfg.num_layers + layer
        self.window = cfg.windows[depth] if cfg.windows else 0
        self.rope = cfg.ropes[cfg.rope_of_depth[depth] if cfg.rope_of_depth else 0]

    def run(self, x):
        """x [T, D] -> [T, D], positions 0 ... T - 1."""
        attended = self.norm("post_attention_norm", self.attend(self.norm("pre_attention_norm", x)))
        before_mlp = x if self.cfg.parallel_residual else x + attended
        mlp = self.norm("post_mlp_norm", self.mlp(self.norm("pre_mlp_norm", before_mlp)))
        return x + attended + mlp

    def attend(self, h):
        cfg, part = self.cfg, self.params["attention"]
        steps = np.arange(len(h))
        q = self.linear(h, part["q"]).reshape(-1, cfg.num_heads, cfg.head_dim)
        unrotated = self.head_norm(q, "q_norm")
        q = self.rotate(unrotated, steps)
        k, v = self.keys_and_values(h, steps)
        behind = steps[:, None] - steps[None]
        seen = (behind >= 0) & ((behind < self.window) | (self.window == 0))
        out = np.zeros(q.shape)
        for head in range(cfg.num_heads):
            mine = head // (cfg.num_heads // cfg.num_kv_heads)
            scores = softcap(q[:, head] @ k[:, mine].T * cfg.attention_scale, cfg.attn_softcap)
            out[:, head] = scipy.special.softmax(np.where(seen, scores, -np.inf), -1) @ v[:, mine]
        if cfg.prefix_length:
            prefix, gate = part["prefix"][self.loop], part["prefix_gate"][self.loop]
            k, v = self.keys_and_values(prefix, np.zeros(len(prefix)))
            for head in range(cfg.num_heads):
                mine = head // (cfg.num_heads // cfg.num_kv_heads)
                scores = unrotated[:, head] @ k[:, mine].T * cfg.attention_scale
                scores = softcap(scores, cfg.attn_softcap)
                out[:, head] += gate[head] * scipy.special.softmax(scores, -1) @ v[:, mine]
        return self.linear(out.reshape(len(h), -1), part["o"])

    def keys_and_values(self, h, positions):
        """h [T, D], normed, at positions [T] -> k, v [T, K, H]."""
        part, shape = self.params["attention"], (-1, self.cfg.num_kv_heads, self.cfg.head_dim)
        k, v = (self.linear(h, part[name]).reshape(shape) for name in "kv")
        return self.rotate(self.head_norm(k, "k_norm"), positions), v

    def rotate(self, heads, positions):
        half = self.cfg.rotary_dim // 2
        theta = self.rope.theta ** (-np.arange(half) / half)
        if self.rope.scaling == "linear":
            theta = theta / self.rope.factor
        else:
            assert self.rope.scaling == "none"
        z = heads[..., :half] + 1j * heads[..., half : 2 * half]
        z = z * np.exp(1j * np.reshape(positions, (-1, 1, 1)) * theta)
        return np.concatenate([z.real, z.imag, heads[..., 2 * half :]], axis=-1)

    def mlp(self, h):
        part, act = self.params["mlp"], ACTIVATIONS[self.cfg.activation]
        up = self.linear(h, part["up"])
        return self.linear(
            act(self.linear(h, part["gate"])) * up if self.cfg.gated_mlp else act(up), part["down"]
        )

    def linear(self, x, part):
        w = part["w"]
        if "lora_a" in part:
            w = w + part["lora_a"][self.loop] @ part["lora_b"][self.loop]
        return x @ w + (at_loop(part["b"], self.loop) if "b" in part else 0)

    def head_norm(self, x, name):
        return (
            norm(self.cfg, x, self.params["attention"][name], self.loop) if self.cfg.qk_norm else x
        )

    def norm(self, name, x):
        """A layer without this norm leaves x as it is."""
        return norm(self.cfg, x, self.params[name], self.loop) if name in self.params else x


def norm(cfg, x, params, loop):
    if cfg.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + cfg.norm_eps)
    x = x * (at_loop(params["scale"], loop) + cfg.norm_offset)
    return x + at_loop(params["bias"], loop) if cfg.norm == "layer" else x


def at_loop(table, loop):
    return table[loop] if table.ndim == 2 else table


def softcap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)
