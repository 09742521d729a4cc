package app

// MetadataUndeliverable is the message metadata key under which a broker says why it will not try a message
// again, for example because its delivery limit is reached. A consumer keeps such a message for a person
// instead of handling it once more: it may be what killed the process.
const MetadataUndeliverable = "takeout-undeliverable"
