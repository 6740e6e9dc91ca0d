"""Quality of the answers after training on real tenants' data: `loramill-bench quality`."""
