"""`python -m ditkit` is `ditkit`; on several processes: `accelerate launch -m ditkit train CONFIG`."""

from ditkit.cli import main

if __name__ == "__main__":
    main()
