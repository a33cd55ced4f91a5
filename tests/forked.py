"""A copy of this process, for work that is to be killed or traced."""

import os
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a fork; its pid. It exits with 0, or with 1 and the traceback on standard error.

    It leaves by `os._exit`: exit handlers of the parent's (an event loop's, say) wait for threads that no fork has.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child
