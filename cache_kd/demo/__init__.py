"""In: nothing but a seed. Out: the embedded data set and the schedule that `cache-kd demo` trains on."""
