"""When Python looks for garbage: seldom, and not among what lives as long as the process. Used by both processes."""

import gc

YOUNG_OBJECTS = 50_000  # before a look at the young ones; the default is 700, which a batch fills in a few steps


def settle_garbage() -> None:
    """Call it once everything is loaded: no collection looks at what is there now, and each makes a shorter pause."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
