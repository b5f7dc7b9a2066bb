"""llama.cpp's HTTP server through its binding xllamacpp, with the options of its own binary that bench/serve.py gives.

python bench/serve.py MODEL --peer bench/llamacpp_server.py --gguf FILE
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from llamacpp import params_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model", type=Path, required=True)
    parser.add_argument("-c", dest="context", type=int, required=True)
    parser.add_argument("-np", dest="parallel", type=int, required=True)
    parser.add_argument("-t", dest="threads", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    import xllamacpp

    params = params_of(args.model, args.context, args.threads, repacked=False)
    params.n_parallel, params.port, params.hostnames = args.parallel, args.port, [args.host]
    params.model_alias = {"served"}
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
