"""python -m t5x_cpm MODE, and the console script t5x_cpm."""

import os
import sys
from collections.abc import Sequence

from t5x_cpm import backend
from t5x_cpm.cli import modes, parse
from t5x_cpm.cli.errors import tell


def main(argv: Sequence[str] | None = None) -> int:
  """The program. Returns its exit code."""
  backend.hide_logs()
  try:
    arguments = parse.parse(sys.argv[1:] if argv is None else argv, modes.MODES)
    if arguments:
      modes.run(arguments)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has seen enough
  except (Exception, KeyboardInterrupt) as error:
    return tell(error)
  return 0


if __name__ == '__main__':
  sys.exit(main())
