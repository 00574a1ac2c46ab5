"""Attribution methods: masks in, scores back, one value per tile."""
