"""Two short rounds of a method: `python tests/smoke.py smoke-per-fedavg-alpha001` runs Per-FedAvg at alpha 0.01.

This is what tox's smoke environments run. Further arguments are options of `pflbench run`.
"""

import re
import subprocess
import sys


def parse(name: str) -> tuple[str, str]:
    """Return the method and the alpha that the name of an environment says."""
    found = re.fullmatch(r"smoke-(.+)-alpha(\d+)", name)
    if found is None:
        sys.exit(f"{name!r} is not smoke-<method>-alpha<digits>")
    method, digits = found.groups()
    return method, f"0.{digits[1:]}" if digits.startswith("0") else digits


def main(name: str, *options: str) -> int:
    """Run the method; where it refuses the network and names the options that help, run it with these."""
    method, alpha = parse(name)
    command = [
        *(sys.executable, "-P", "-m", "pflbench", "run"),  # -P: the installed pflbench, and not a checkout's
        *("--algo", method, "--alpha", alpha, "--dataset", "synthetic10"),
        *("--rounds", "2", "--local-epochs", "1", "--eval-every", "2", "--force", *options),
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode == 2 and "--norm batch" in done.stderr:
        return subprocess.run([*command, "--norm", "batch"]).returncode
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
