"""What is computed: one small file per model family. Sees attention only as the callable it is handed."""
