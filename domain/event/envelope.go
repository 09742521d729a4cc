package event

import (
	"cmp"
	"errors"
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"takeout/domain"
)

// Envelope is an event on the wire: CloudEvents 1.0 in its structured JSON form, the same bytes on every broker.
// https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
type Envelope struct {
	SpecVersion     string         `json:"specversion"`
	ID              string         `json:"id"` // the broker's message id and the inbox key
	Source          string         `json:"source"`
	Type            string         `json:"type"` // takeout.<key>.v1
	Subject         string         `json:"subject"`
	Time            time.Time      `json:"time"` // UTC
	DataContentType string         `json:"datacontenttype"`
	OrderVersion    int64          `json:"orderversion"`
	TraceParent     string         `json:"traceparent,omitzero"`
	Data            jsontext.Value `json:"data"`
}

// MaxID is the longest event id in bytes.
const MaxID = 100

// MaxVersion is the highest version of an order that an event can have.
const MaxVersion = 1<<31 - 1

// TypeOf returns the CloudEvents type of events with that key.
func TypeOf(key string) string { return "takeout." + key + ".v1" }

// Encode returns the event as CloudEvents JSON. The id names this event for ever: each time it is sent again, it is
// sent with the same id.
func Encode(id string, at time.Time, e Event) ([]byte, error) {
	service, _, _ := strings.Cut(e.Key(), ".")
	return json.Marshal(struct {
		Envelope
		Data Event `json:"data"` // in place of the envelope's, which would be encoded first and then checked and copied
	}{Envelope{
		SpecVersion:     "1.0",
		ID:              id,
		Source:          "/takeout/" + service,
		Type:            TypeOf(e.Key()),
		Subject:         e.Subject(),
		Time:            domain.Micro(at),
		DataContentType: "application/json",
		OrderVersion:    e.OrderVersion(),
	}, e})
}

// Decode reads an event of type E from a message. messageID is the id that the broker carried beside the body,
// empty if it carried none. Attributes and members that are not known are ignored, so that a newer producer can
// add some. Everything else that is not as Encode writes it is Invalid, a member that comes twice too, which one program
// would read so and another otherwise: the message cannot become right by trying again.
func Decode[E Event](messageID string, body []byte) (Envelope, E, error) {
	var (
		env Envelope
		e   E
	)
	if len(body) == 0 {
		return env, e, domain.Errorf(domain.Invalid, "event_empty", "the message is empty")
	}
	if !utf8.Valid(body) {
		return env, e, domain.Errorf(domain.Invalid, "event_not_utf8", "the message is not UTF-8")
	}
	if err := json.Unmarshal(body, &env); err != nil {
		return env, e, malformed("the message is not a CloudEvents 1.0 JSON object", err)
	}
	if err := env.check(messageID, TypeOf(e.Key())); err != nil {
		return env, e, err
	}
	if err := json.Unmarshal(env.Data, &e); err != nil {
		return env, e, malformed("the event's data does not fit its type "+env.Type, err)
	}
	if e.Subject() != env.Subject || e.OrderVersion() != env.OrderVersion {
		return env, e, domain.Errorf(domain.Invalid, "event_contradictory",
			"the event's subject and orderversion must be those of its data")
	}
	return env, e, domain.CheckID("order_id", env.Subject)
}

func (env *Envelope) check(messageID, wantType string) error {
	refuse := func(code, format string, args ...any) error {
		return domain.Errorf(domain.Invalid, code, format, args...)
	}
	switch {
	case env.SpecVersion != "1.0":
		return refuse("event_spec_version", `the event's specversion must be "1.0"`)
	case !validID(env.ID):
		return refuse("event_id_invalid", "the event's id must be 1 to %d visible ASCII characters", MaxID)
	case messageID != "" && messageID != env.ID:
		return refuse("event_id_mismatch", "the event's id must be the id of the message that carries it")
	case env.Type != wantType:
		return refuse("event_type_unexpected", "the event's type must be %s on this queue", wantType)
	case env.OrderVersion < 1 || env.OrderVersion > MaxVersion:
		return refuse("event_version_invalid", "the event's orderversion must be between 1 and %d", MaxVersion)
	case env.Time.IsZero():
		return refuse("event_time_missing", "the event's time is missing")
	case len(env.Data) == 0:
		return refuse("event_data_missing", "the event's data is missing")
	}
	return nil
}

func validID(s string) bool {
	if s == "" || len(s) > MaxID {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// malformed says what does not fit, and repeats nothing of the message: errors go to the log, and messages hold what
// must not.
func malformed(what string, err error) error {
	if wrong, ok := errors.AsType[*json.SemanticError](err); ok {
		field := strings.ReplaceAll(strings.TrimPrefix(string(wrong.JSONPointer), "/"), "/", ".") // a member that is known here
		if wrong.GoType == reflect.TypeFor[time.Time]() {
			return domain.InvalidField(field, "event_malformed", "%s: %s must be a time such as 2006-01-02T15:04:05Z", what, field)
		}
		return domain.InvalidField(field, "event_malformed", "%s: %s has the wrong type or is out of range", what, cmp.Or(field, "it"))
	}
	wrong, _ := errors.AsType[*jsontext.SyntacticError](err) // there is no other kind
	if errors.Is(err, jsontext.ErrDuplicateName) {
		return domain.Errorf(domain.Invalid, "event_malformed", "%s: a member comes twice, the second time at byte %d", what, wrong.ByteOffset)
	}
	return domain.Errorf(domain.Invalid, "event_malformed", "%s: it is not JSON from byte %d on", what, wrong.ByteOffset)
}

// lenient is for what a message says although it may be refused: of members that come twice, the last one counts.
var lenient = json.JoinOptions(jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))

// SubjectOf returns the order id that a message says it is about, empty if it does not say so in a way that could
// be right. It is for logs and lists, where a message that cannot be decoded must be found too.
func SubjectOf(body []byte) string {
	var env struct {
		Subject string `json:"subject"`
	}
	if len(body) > maxSubjectSearch || json.Unmarshal(body, &env, lenient) != nil || domain.CheckID("order_id", env.Subject) != nil {
		return ""
	}
	return env.Subject
}

// maxSubjectSearch is the longest message that SubjectOf reads, in bytes.
const maxSubjectSearch = 1 << 20
