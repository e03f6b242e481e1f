"""What fills docs/ledger.md: each script measures promises and writes them beside what came out."""
