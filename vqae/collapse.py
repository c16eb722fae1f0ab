"""A warning when the codebook collapses: few of its codes in use, and the option to look at."""

from torch import Tensor

from vqae.config import Config


def collapse_warning(config: Config, counts: Tensor, step: int) -> str | None:
    """What to say, after an epoch, of a codebook of which fewer than half is in use; None where that is not so.

    The rule, and why it is this one:

    - It counts on pictures held out from training. A code that restarts is chosen at once by the picture that it was
      put at, so that training's own count calls a collapsed codebook well used as long as it restarts.
    - Half means half of the codes that as many pictures would reach by choosing evenly: 40 pictures cannot choose 256.
    - It waits until every code that began unused was restarted, and had as long again to find pictures of its own:
      2·restart_steps. Without restarts there is nothing to wait for: what no picture of an epoch chose got no
      gradient, and will get none.

    Args:
        config: the run's settings.
        counts: [K] int64, how many pictures of validation and test chose each code.
        step: training steps so far.
    """
    num_codes, num_pictures = counts.numel(), int(counts.sum())
    codes_used = int((counts > 0).sum())
    expected = num_codes * (1 - (1 - 1 / num_codes) ** num_pictures)  # of num_pictures drawn evenly
    if codes_used >= expected / 2 or step < 2 * config.restart_steps:
        return None
    return (
        f"warning: the {num_pictures:,} pictures held out chose {codes_used} of {num_codes} codes, "
        f"fewer than half of those they could: look at {_option_to_look_at(config)}"
    )


def _option_to_look_at(config: Config) -> str:
    """The option that most likely is to blame, and what it does about it."""
    if config.restart_after == 0:
        return f"--restart-after {Config.restart_after}, which puts codes that are never chosen at embeddings"
    if config.codebook_step == "plain":
        return "--codebook-step share: by plain SGD the codes hardly move"
    if config.embedding_norm == "none":
        return (
            f"--encoder-lr, now {config.encoder_lr:g}: a slower encoder leaves the embeddings near the codes, "
            "as --embedding-norm batch does"
        )
    return f"--restart-after, now {config.restart_after} pictures: fewer bring unused codes back sooner"
