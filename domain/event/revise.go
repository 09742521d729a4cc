package event

import (
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"takeout/domain"
)

// Revise returns the event in body as a new event, for a person who corrects one that could not be handled: with that
// id, made now, and with the attribute causationid naming the event that it replaces. All other attributes stay. If
// data is not nil it takes the place of the event's data, and subject and orderversion become what it says. It is
// Invalid if body is not a JSON object, or data is not one that names its order. Whether the event is right otherwise
// is for Decode to say.
func Revise(body []byte, id, causation string, at time.Time, data []byte) ([]byte, error) {
	var attributes map[string]jsontext.Value
	if err := json.Unmarshal(body, &attributes, lenient); err != nil || attributes == nil {
		return nil, domain.Errorf(domain.Invalid, "event_malformed", "the message is not a JSON object")
	}
	changed := map[string]any{"id": id, "time": domain.Micro(at), "causationid": causation}
	if data != nil {
		var about struct { // what the data of every event says
			OrderID *string `json:"order_id"`
			Version *int64  `json:"version"`
		}
		if err := json.Unmarshal(data, &about); err != nil || about.OrderID == nil || about.Version == nil {
			return nil, domain.InvalidField("data", "event_data_invalid", "data must be an object with order_id, a text, and version, a whole number")
		}
		changed["data"], changed["subject"], changed["orderversion"] = jsontext.Value(data), *about.OrderID, *about.Version
	}
	for name, value := range changed {
		encoded, err := json.Marshal(value)
		if err != nil {
			return nil, domain.Errorf(domain.Invalid, "event_malformed", "the event's %s cannot be written as JSON", name)
		}
		attributes[name] = encoded
	}
	return json.Marshal(attributes, lenient, json.Deterministic(true))
}

// IDOf returns the id that a message says its event has, empty if it says none that could be right.
func IDOf(body []byte) string {
	var env struct {
		ID string `json:"id"`
	}
	if json.Unmarshal(body, &env, lenient) != nil || !validID(env.ID) {
		return ""
	}
	return env.ID
}
