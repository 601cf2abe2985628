"""What every config starts from, and how `--config=FILE:arg` arguments are read.

Each value is documented here once; the other configs change what they must.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()

    # Where the model comes from. Restore order: workdir > init_from > source > scratch.
    c.source = ""  # HF directory, .gguf, hub id or 'tiny': is converted, and teaches when kd > 0
    c.init_from = ""  # checkpoint directory to start from instead of converting `source`
    c.scratch = ConfigDict()  # DecoderConfig fields of a model trained from random weights
    c.tokenizer = ""  # directory, only with `scratch`; otherwise the source's

    c.model = ConfigDict()
    c.model.num_loops = 2
    # order of the layers: cycle 1,2,3,1,2,3 sequence 1,1,2,2,3,3 cycle_rev 1,2,3,3,2,1
    c.model.sharing = "cycle"
    # stepwise average lower upper random; None = stepwise, or average with a fitted or SVD LoRA
    c.model.method = config_dict.placeholder(str)
    c.model.lora_init = config_dict.placeholder(str)  # joint svd zero split none; None = by method
    c.model.metric = "auto"  # of lora_init=joint: auto fisher activations none
    c.model.refit = False  # then fit the LoRAs anew on the tied model's own inputs
    c.model.calibrate = "docstrings:1"  # text of that metric, as data.train
    c.model.calibration_tokens = 16_384
    # N for every projection, clamped to its size; 'full'; or a rank by projection
    c.model.lora_rank = config_dict.placeholder(object)
    c.model.lora_rank = 0
    # instead of a rank: share of the source's layers for all LoRAs, such as 0.15
    c.model.lora_budget = config_dict.placeholder(float)
    c.model.prefix_length = 0  # learnable vectors of each layer and loop, seen by all queries
    c.model.norms = "per_loop"  # tied per_loop folded
    c.model.rounding = "even"  # of stepwise positions: even half_up floor
    # average choice zero own; None = own with a fitted or SVD LoRA and norms per loop, else by
    # method
    c.model.norm_start = config_dict.placeholder(str)
    c.model.reduced_baseline = False  # instead: random, depth / num_loops layers, no loop

    c.data = ConfigDict()
    # files, directories, jsonl(.gz .zst), tfds:NAME, comma between; or directories of
    # recursive_jax.tokenize, with weights: DIR1:0.7,DIR2:0.3
    c.data.train = "docstrings"
    c.data.valid = ""  # the same; '' = a held-out share of `train`
    c.data.valid_fraction = 0.01
    c.data.context_length = 512  # tokens per row
    c.data.batch_size = 8  # rows per step, over all devices
    c.data.cache_dir = ""  # tokenised text; '' = the user's cache directory
    c.data.eval_tokens = 20_000  # scored at each evaluation
    c.data.epochs = 1  # most passes over a directory of recursive_jax.tokenize
    c.data.teacher = ""  # directory of recursive_jax.teach; '' = the teacher runs in each step

    c.objective = ConfigDict()  # recursive_jax.training.losses.Objective
    c.objective.ce = 1.0
    c.objective.kd = 1.0  # forward KL from the source, running in the same step; 0 = none
    c.objective.kd_loss = "forward_kl"
    c.objective.temperature = 1.0
    c.objective.exit_loss = "aggressive"  # final loop 1, earlier ones exit_coefficient; or weighted
    c.objective.exit_coefficient = 0.0  # of each earlier loop's cross-entropy; paper: 0.1
    c.objective.exit_kd = 0.0

    c.optimizer = ConfigDict()  # recursive_jax.training.optimizer.OptimizerConfig
    c.optimizer.name = "adamw"  # adafactor lion muon
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "cosine"  # wsd constant
    c.optimizer.warmup_steps = 200
    c.optimizer.final_fraction = 0.1
    c.optimizer.decay_share = 0.2  # of the steps, at the end of wsd
    # factors of the learning rate by path, the first match counts, 0 freezes; such as
    # 'embedding=0 block/.*/lora_[ab]=2 .*=1'
    c.optimizer.rates = ""
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.mu_dtype = "float32"  # of first moments; or bfloat16
    c.optimizer.weight_decay = 0.1
    c.optimizer.decay_on = "weights"  # or matrices: LoRA factors and embeddings as well
    c.optimizer.clip_norm = 1.0
    c.optimizer.lora_lr_scale = 1.0

    # What changes where the start is near its source (recursive_jax.training.config.NearStart)
    c.near = ConfigDict()
    c.near.kl = 2.0  # nats per token, as its certificate measured: near up to here; 0 = never
    c.near.cross_entropy = 0.0  # instead of objective.ce
    c.near.learning_rate_scale = 0.5
    c.near.max_warmup_steps = 20

    c.tokens = 1_000_000  # at least so many; a step takes batch_size * context_length
    c.accumulate = 1  # micro-batches of a step: less memory, the same step
    c.ema_decay = 0.0  # of averaged weights, which are then what is evaluated and used; 0 = none
    c.loop_curriculum = "none"  # loops of a step: all; or random; or growing from one to all …
    c.loop_curriculum_share = 0.25  # … over this share of the run
    c.seed = 0
    c.dtype = "auto"  # compute: float32 on CPU, bfloat16 on TPU and GPU
    c.remat = "dots"  # none full dots offload_dots save_all_but_merged
    c.gather = "auto"  # weights spread over devices: once a step if that fits; or step, layer
    c.unroll_layers = 1
    c.max_skipped_steps = 8  # in a row, where loss or gradient is not finite; then the run stops
    c.peak_flops = 0.0  # bfloat16 FLOP/s of one device, for MFU; 0 = by the kind of the device
    c.wandb = ""  # project of Weights & Biases that gets the metrics as well
    c.log_every = 10  # steps
    c.eval_every = 250
    c.checkpoint_every = 500
    c.keep_checkpoints = 2  # the newest; older ones are removed, but for the two kinds below
    c.keep_best = 0  # so many with the lowest validation loss; needs eval_every at the same steps
    c.keep_every = 0  # those at multiples of this step; 0 = none

    c.mesh = ConfigDict()  # devices by axis, one may be -1
    c.mesh.data = -1
    c.mesh.fsdp = 0  # 0: on TPUs the chips of a slice, elsewhere 1
    c.mesh.tensor = 1
    c.lock()  # an unknown key is an error
    c.scratch.unlock()
    return c


def paper_training(c: ConfigDict) -> None:
    """The paper's start and uptraining (App. E): 60B tokens, 2M a step, lr 2e-4, norms tied."""
    c.model.norms = "tied"
    c.model.lora_init = "svd"
    c.data.train = "tfds:slim_pajama"  # not in the TFDS catalogue: give your copy
    c.data.context_length = 2048
    c.data.batch_size = 1024
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 800
    c.tokens = 60_000_000_000
    c.eval_every = 500
    c.checkpoint_every = 500


def small_training(c: ConfigDict) -> None:
    """Uptraining that one small machine finishes: 200k tokens, 1k a step."""
    c.data.context_length = 256
    c.data.batch_size = 4
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 20
    c.tokens = 200_000
    c.eval_every = 50
    c.checkpoint_every = 50


def parse_arg(arg: str | None, **defaults):
    """`'paper,loops=3'` -> ConfigDict(paper=True, loops=3): flags, and values typed by default.

    A `rank` may also be 'full'. An unknown name raises, naming what there is.
    """
    values = dict(defaults)
    for part in (arg or "").split(","):
        if not part:
            continue
        name, _, text = part.partition("=")
        if name not in values:
            raise ValueError(f"unknown config argument {name!r}; expected {', '.join(defaults)}")
        default = values[name]
        if isinstance(default, bool):
            words = {"": True, "true": True, "1": True, "false": False, "0": False}
            if text.lower() not in words:
                raise ValueError(f"config argument {name}={text!r}: expected true or false")
            values[name] = words[text.lower()]
            continue
        if name == "rank" and text == "full":
            values[name] = text
            continue
        try:
            values[name] = type(default)(text)
        except ValueError as error:
            kind = type(default).__name__
            raise ValueError(f"config argument {name}={text!r}: expected {kind}") from error
    return ConfigDict(values)
