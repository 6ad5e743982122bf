"""Run pieces of Python one after another: python run_pieces.py JOBS RESULTS.

One process for many pieces, since importing takes longer than most of them. A job is {"argv", "stdin", "sources"}:
sources that share names, as the code on a page does; no job sees the names or the files of another. The results hold
for each job what it printed, and the error that ended it, if one did.
"""

import contextlib
import io
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, str]:
    printed, said, error = io.StringIO(), io.StringIO(), ""
    sys.argv, sys.stdin = job["argv"], io.StringIO(job["stdin"])
    names = {"__name__": "__main__"}
    folder = tempfile.TemporaryDirectory()
    with folder, contextlib.chdir(folder.name), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            for source in job["sources"]:
                exec(compile(source, job["argv"][0], "exec"), names)
        except SystemExit as end:
            error = "" if end.code in (None, 0) else f"exit status {end.code}: {said.getvalue()}"
        except BaseException:
            error = traceback.format_exc()
    return {"printed": printed.getvalue(), "error": error}


if __name__ == "__main__":
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    results.write_text(json.dumps({name: run(job) for name, job in json.loads(jobs.read_text()).items()}))
