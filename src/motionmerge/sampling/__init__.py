"""Videos: pipelines, families of models, requests, single videos and batches."""
