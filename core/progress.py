"""How far long work has come: a bar on a terminal; elsewhere, as in the log of a job, lines at fair intervals."""

import sys

from tqdm import tqdm

SOONEST, LATEST, SHARE = 10, 600, 0.1  # a line is due after a tenth of the time so far, in these bounds, in seconds
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc}{n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {elapsed} gone, {remaining} left{postfix}"


class _Lines(tqdm):
    """A tqdm that prints whole lines instead of drawing over one: 20 in a minute of an hour would drown a log."""

    def __init__(self, *arguments, **options):
        self.shown = None  # what was counted when it was last seen
        super().__init__(*arguments, **options, leave=False, bar_format=LINE, mininterval=SOONEST, delay=SOONEST,
                         miniters=1)

    def display(self, msg=None, pos=None):
        """What tqdm calls when something is to be seen, and once more at the end."""
        if self.n == self.shown:
            return
        self.shown = self.n
        self.fp.write(" ".join(str(self).split()) + "\n")  # tqdm pads numbers
        self.fp.flush()
        self.mininterval = min(LATEST, max(SOONEST, SHARE * self.format_dict["elapsed"]))


def progress_bar(items=None, *, total, unit, title=None, initial=0, active=True, leave=True):
    """A tqdm over `items`, or one to `update()`; work of less than ten seconds leaves nothing in a log.

    `unit`: what is counted, in the plural; `title`: what is done; `initial`: how much of `total` is there already;
    `active`: False on all processes but the first; `leave`: whether a bar stays on the terminal at its end.
    """
    about = {"iterable": items, "total": total, "unit": f" {unit}", "desc": title and f"{title}: ", "initial": initial,
             "disable": not active}
    return tqdm(**about, leave=leave, bar_format=BAR) if sys.stderr.isatty() else _Lines(**about)


def say(line):
    """Print one line, above the bar where there is one."""
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(line, flush=True)
