"""The command in processes of its own that begin as copies of one, which has imported what its verbs need."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# a copy leaves the loop with the arguments of the command
LOOP = """
import json, os, sys
from hydraopt_jax.cli import changes, hub, main, stores
for line in sys.stdin:
    arguments, environment, folder, *files = json.loads(line)
    copy = os.fork()
    if not copy:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)
else:
    sys.exit()
main(arguments)
"""


@contextmanager
def copies(place) -> Iterator:
    """`call(arguments, poison, environment, folder)` -> exit status, output and errors; notes in `place`.

    `poison` is run before anything is imported. A copy has the environment that is given, not that of
    the process that it is a copy of.
    """
    running = []

    @cache
    def origin(poison):
        code = [sys.executable, "-c", poison + LOOP]
        running.append(subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    def call(arguments, poison, environment, folder):
        process, files = origin(poison), [place / "out", place / "error"]
        asked = [[str(x) for x in arguments], dict(environment), str(folder), *map(str, files)]
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), *(x.read_text() for x in files)

    try:
        yield call
    finally:
        for x in running:
            x.communicate()
