"""Where new data comes from, besides `loramill data add`."""
