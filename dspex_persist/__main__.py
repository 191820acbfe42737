"""python -m dspex_persist"""

from dspex_persist.cli import main

if __name__ == "__main__":
    main()
