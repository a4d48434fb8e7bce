#!/usr/bin/env python
"""Write the page that shows a calibration, from a tuned file and the statistics beside it; print it in ten lines.

    python evaluate/report.py models_dict/demo_llama_tuned.pt
    python evaluate/report.py models_dict/demo_llama_tuned.pt --out_path out/demo.html

One HTML file that loads nothing. Exit code 2: a file is missing or cannot be used.
"""

import sys

from modify_model.cli.main import report_main

if __name__ == "__main__":
    sys.exit(report_main("report.py", sys.argv[1:], __doc__))
