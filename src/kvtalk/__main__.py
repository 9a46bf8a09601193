"""``python -m kvtalk``, which ``accelerate launch -m kvtalk`` runs in every process."""

from kvtalk.cli import main

main()
