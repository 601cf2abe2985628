"""The prompts that the command line describes, with the options of their answers."""

from __future__ import annotations

import functools

from absl import flags

from recursive_jax.decoding import prompts as prompts_lib
from recursive_jax.decoding.prompts import Prompt


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags in a function: importing a job adds no flags to another job."""
    string, strings, integer, number, boolean = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_multi_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
        )
    )
    string("prompt", None, "one prompt, answered on the terminal")
    string("prompts", None, "file: one prompt a line, or .jsonl")
    string("out", None, "answers as JSON lines: id, text, tokens, exit_loops, finish_reason")
    boolean("chat", False, "prompts are a user's messages: apply the chat template")
    # A line of a .jsonl file can override these.
    integer("max_new_tokens", 128, "tokens of an answer, at most")
    number("temperature", 0.0, "0 takes the most likely token")
    integer("top_k", 0, "sample among the k most likely tokens; 0 = all")
    number("top_p", 1.0, "sample within this share of the probability; 1 = all")
    number("min_p", 0.0, "drop tokens below this fraction of the likeliest; 0 = none")
    number("repetition_penalty", 1.0, "divides logits of tokens in prompt and answer; 1 = none")
    number("presence_penalty", 0.0, "subtracted from the logits of tokens in the answer")
    number("frequency_penalty", 0.0, "subtracted once for every time the token is in the answer")
    integer("seed", 0, "of sampling; --prompts derives a seed for every line from it")
    strings("stop", None, "text that ends an answer and is no part of it; may be repeated")
    boolean("logprobs", False, "return the log-probability of every generated token, in nats")
    integer("min_loops", 1, "loops that every token runs at least")
    integer(
        "max_loops",
        None,
        "loops after which the next token is chosen (lossless: drafted) at the latest; "
        "default: all. The first token needs all loops anyway",
    )


def check_values(options: flags.FlagValues) -> None:
    """Raise ValueError for flags that no prompt can be answered with. Reads no file."""
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("nothing to answer: give either --prompt=TEXT or --prompts=FILE")
    if options.prompts is not None and not options.out:
        raise ValueError("--prompts needs --out=FILE for the answers")
    prompts_lib.make_request(0, (0,), (), _defaults(options))


def read_prompts(options: flags.FlagValues) -> list[Prompt]:
    """The prompts: that of --prompt, or those of the file --prompts."""
    if options.prompts is None:
        return [Prompt(1, options.prompt, _defaults(options))]
    return prompts_lib.read_prompts(options.prompts, _defaults(options))


def _defaults(options: flags.FlagValues) -> dict:
    defaults = {name: options[name].value for name in prompts_lib.OPTIONS if name in options}
    return defaults | {"stop": options.stop or (), "exit_threshold": None}  # None: the engine's
