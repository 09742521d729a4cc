package app

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"takeout/domain"
	"takeout/domain/event"
)

// What becomes of a failure. An open one waits for a person and is never deleted.
const (
	FailureOpen      = "open"
	FailureRetrying  = "retrying"  // waits for its consumer once more, or is there now
	FailureResolved  = "resolved"  // its retry was handled
	FailureDiscarded = "discarded" // a person said that it need not be handled
	FailureReplaced  = "replaced"  // a person sent a corrected message in its place
)

// Limits of what one call repairs.
const (
	// MaxRetryPayload is the largest message that can be retried, in bytes.
	MaxRetryPayload = 8 << 20
	// MaxRetries is the most failures that one call retries.
	MaxRetries = 10_000
	// maxRetryBytes is the most that the messages of one call together may hold; it is one transaction.
	maxRetryBytes = 64 << 20
	// storeTimeout is how long one database may take, so that the others can be shown without it.
	storeTimeout = 3 * time.Second
)

// FailureID names a failure outside of its database: "dispatch-17".
type FailureID struct {
	Service string
	Number  int64 // 1 or more
}

// String returns the id as people and programs see it.
func (id FailureID) String() string { return id.Service + "-" + strconv.FormatInt(id.Number, 10) }

// ParseFailureID reads what String wrote, and reports whether it was that.
func ParseFailureID(s string) (FailureID, bool) {
	service, digits, _ := strings.Cut(s, "-")
	number, err := strconv.ParseInt(digits, 10, 64)
	id := FailureID{service, number}
	return id, err == nil && number > 0 && service != "" && id.String() == s
}

// KeptFailure is a failure as it is kept.
type KeptFailure struct {
	ID            FailureID
	Failure       // without the payload
	State         string
	PayloadSize   int64 // bytes
	Occurrences   int   // how often the same message was given up
	FirstFailedAt time.Time
	LastFailedAt  time.Time
	ClosedAt      time.Time // zero while it is open or being retried
	ReplacedBy    string    // the event id of the corrected message, empty if there is none
	Actions       []FailureAction
}

// FailureAction is what somebody did with a failure.
type FailureAction struct {
	At       time.Time
	Operator string // 1 to 64 characters
	Action   string // retry, edit or discard; or what the program itself did then
	Reason   string // at most 500 characters
}

// FailureFilter chooses failures. What is empty chooses all.
type FailureFilter struct {
	Handler string // the queue
	Class   string
	Code    string
	OrderID string
	State   string
	Since   time.Time // of the last time that it failed
	Until   time.Time // exclusive
	Text    string    // in the error, the message id or the payload
}

// FailureGroup are the failures that have their handler and their error in common. In the error's text the ids of
// order and message are left out.
type FailureGroup struct {
	Handler, Class, Code, Error string

	Count   int
	First   time.Time // that one of them failed
	Last    time.Time // that one of them failed
	Example FailureID // the newest
}

// FailureRetry says how failures of one database are retried.
type FailureRetry struct {
	FailureAction
	Batch   string        // of retries that stop together when one fails, empty if they do not
	Delay   time.Duration // before the first
	Spacing time.Duration // between one and the next
}

// Correction is a message that takes a failure's place.
type Correction struct {
	EventID  string
	OrderID  string
	Payload  []byte
	Metadata map[string]string
}

// FailureStore is the failures of one service's database.
type FailureStore interface {
	// ListFailures returns at most limit failures without headers and actions, newest first, from the one before that
	// number on; from the newest on if it is 0.
	ListFailures(ctx context.Context, filter FailureFilter, before int64, limit int) ([]KeptFailure, error)
	// CountFailures returns how many there are.
	CountFailures(ctx context.Context, filter FailureFilter) (int, error)
	// GroupFailures returns at most limit groups, the largest first.
	GroupFailures(ctx context.Context, filter FailureFilter, limit int) ([]FailureGroup, error)
	// OldestFailures returns at most limit failures, oldest first, with no more than their number and size.
	OldestFailures(ctx context.Context, filter FailureFilter, limit int) ([]KeptFailure, error)
	// GetFailure returns one with all that is known of it. NotFound if there is none.
	GetFailure(ctx context.Context, number int64) (KeptFailure, error)
	// FailurePayload returns the message's bytes, at most limit of them.
	FailurePayload(ctx context.Context, number, limit int64) ([]byte, error)

	// RetryFailures sends those of the failures that are open to their consumers again, oldest first, and returns
	// which these are. The numbers ascend, and no message is larger than MaxRetryPayload.
	RetryFailures(ctx context.Context, numbers []int64, retry FailureRetry) ([]int64, error)
	// ReplaceFailure closes an open failure and sends the correction to its consumer. It reports false if the failure
	// was not open, and then did nothing.
	ReplaceFailure(ctx context.Context, number int64, by Correction, action FailureAction) (bool, error)
	// DiscardFailure closes a failure that is open or being retried, and calls off a retry that waits. It reports false
	// if the failure was closed, and then did nothing.
	DiscardFailure(ctx context.Context, number int64, action FailureAction) (bool, error)
}

// FailureDesk is where people repair what consumers gave up, in all databases that this process opens.
type FailureDesk struct {
	stores   map[string]FailureStore
	validate func(queue, messageID string, body []byte) error
	keys     event.Keys
}

// NewFailureDesk returns the desk over the databases by service. validate says whether the consumer of the queue could
// read a message. Corrected messages are signed with the keys, if there are any.
func NewFailureDesk(stores map[string]FailureStore, validate func(queue, messageID string, body []byte) error, keys event.Keys) *FailureDesk {
	return &FailureDesk{stores, validate, keys}
}

// FailurePage is a part of a list of failures.
type FailurePage struct {
	Failures    []KeptFailure
	Next        []FailureID // where each database's part of the next page begins; nil on the last page
	Unavailable []string    // services whose database is away: their failures are missing here
}

// List returns failures of all databases, newest first. after is Next of the page before. Unavailable if every database
// is away.
func (d *FailureDesk) List(ctx context.Context, filter FailureFilter, after []FailureID, limit int) (FailurePage, error) {
	position := map[string]int64{}
	for _, id := range after {
		position[id.Service] = id.Number
	}
	lists, away, err := ask(ctx, d, func(ctx context.Context, service string, store FailureStore) ([]KeptFailure, error) {
		return store.ListFailures(ctx, filter, position[service], limit+1)
	})
	if err != nil {
		return FailurePage{}, err
	}
	page := FailurePage{Unavailable: away}
	for len(page.Failures) < limit {
		newest := ""
		for _, service := range slices.Sorted(maps.Keys(lists)) {
			if len(lists[service]) > 0 && (newest == "" || lists[service][0].FirstFailedAt.After(lists[newest][0].FirstFailedAt)) {
				newest = service
			}
		}
		if newest == "" {
			return page, nil
		}
		f := lists[newest][0]
		f.ID.Service = newest
		lists[newest], position[newest] = lists[newest][1:], f.ID.Number
		page.Failures = append(page.Failures, f)
	}
	for _, rest := range lists {
		if len(rest) > 0 {
			for _, service := range slices.Sorted(maps.Keys(position)) {
				page.Next = append(page.Next, FailureID{service, position[service]})
			}
			return page, nil
		}
	}
	return page, nil
}

// Groups returns what fails why and how often, the most frequent first, and the services whose database is away.
// Unavailable if all are.
func (d *FailureDesk) Groups(ctx context.Context, filter FailureFilter, limit int) ([]FailureGroup, []string, error) {
	lists, away, err := ask(ctx, d, func(ctx context.Context, service string, store FailureStore) ([]FailureGroup, error) {
		groups, err := store.GroupFailures(ctx, filter, limit)
		for i := range groups {
			groups[i].Example.Service = service
		}
		return groups, err
	})
	var all []FailureGroup
	for _, service := range slices.Sorted(maps.Keys(lists)) {
		all = append(all, lists[service]...)
	}
	slices.SortStableFunc(all, func(a, b FailureGroup) int { return b.Count - a.Count })
	return all[:min(len(all), limit)], away, err
}

// ask asks all databases at the same time. It returns what they answered and which are away, and fails if all are.
func ask[T any](ctx context.Context, d *FailureDesk, question func(ctx context.Context, service string, store FailureStore) (T, error)) (map[string]T, []string, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	answers := map[string]T{}
	var away []string
	var failed, lost error
	var mu sync.Mutex
	var asking sync.WaitGroup
	for service, store := range d.stores {
		asking.Go(func() {
			answer, err := question(ctx, service, store)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				answers[service] = answer
			case domain.KindOf(err) == domain.Unavailable:
				away, lost = append(away, service), err
			default:
				failed = err
			}
		})
	}
	asking.Wait()
	slices.Sort(away)
	if failed == nil && len(answers) == 0 {
		failed = lost
	}
	return answers, away, failed
}

// Get returns a failure with all that is known of it but its payload. NotFound if there is none.
func (d *FailureDesk) Get(ctx context.Context, id FailureID) (KeptFailure, error) {
	store, err := d.store(id)
	if err != nil {
		return KeptFailure{}, err
	}
	f, err := store.GetFailure(ctx, id.Number)
	f.ID = id
	return f, err
}

// Payload returns the bytes of a failure that Get returned, at most limit of them.
func (d *FailureDesk) Payload(ctx context.Context, f KeptFailure, limit int64) ([]byte, error) {
	return d.stores[f.ID.Service].FailurePayload(ctx, f.ID.Number, min(limit, f.PayloadSize))
}

func (d *FailureDesk) store(id FailureID) (FailureStore, error) {
	store, ok := d.stores[id.Service]
	if !ok {
		return nil, domain.Errorf(domain.NotFound, "failure_not_found", "there is no such failure here; this process keeps those of: %s",
			strings.Join(slices.Sorted(maps.Keys(d.stores)), ", "))
	}
	return store, nil
}

// Retry sends an open failure's message to its consumer once more. If that fails, the failure is open again. NotFound if
// there is no such failure, Conflict if it is not open, Invalid if its message is too large.
func (d *FailureDesk) Retry(ctx context.Context, id FailureID, action FailureAction) (KeptFailure, error) {
	f, err := d.Get(ctx, id)
	if err != nil {
		return KeptFailure{}, err
	}
	if f.PayloadSize > MaxRetryPayload {
		return KeptFailure{}, domain.Errorf(domain.Invalid, "failure_too_large",
			"the message of failure %s has %d bytes; one above %d cannot be retried: correct it by edit, or discard it", id, f.PayloadSize, MaxRetryPayload)
	}
	action.Action = "retry"
	retried, err := d.stores[id.Service].RetryFailures(ctx, []int64{id.Number}, FailureRetry{FailureAction: action})
	return d.acted(ctx, id, action.Action, len(retried) == 1, err)
}

// Discard closes a failure for good without its message being handled. A retry that waits is called off. NotFound if
// there is no such failure, Conflict if it is closed.
func (d *FailureDesk) Discard(ctx context.Context, id FailureID, action FailureAction) (KeptFailure, error) {
	if _, err := d.Get(ctx, id); err != nil {
		return KeptFailure{}, err
	}
	action.Action = "discard"
	done, err := d.stores[id.Service].DiscardFailure(ctx, id.Number, action)
	return d.acted(ctx, id, action.Action, done, err)
}

// FailureEdit says what takes the place of a failed message: other data in the same event, or another event.
type FailureEdit struct {
	EventID string          // of the new event
	Data    json.RawMessage // nil if Payload says it
	Payload []byte
}

// Edit closes an open failure and sends a corrected message to its consumer, which knows it as a new event. The original
// stays as it is and names the new event; the new event's causationid names the original. NotFound if there is no such
// failure, Conflict if it is not open, Invalid if the consumer could not read the new event.
func (d *FailureDesk) Edit(ctx context.Context, id FailureID, edit FailureEdit, action FailureAction) (KeptFailure, error) {
	f, err := d.Get(ctx, id)
	if err != nil {
		return KeptFailure{}, err
	}
	original, err := d.Payload(ctx, f, MaxRetryPayload)
	if err != nil {
		return KeptFailure{}, err
	}
	body, err := edit.apply(f, original)
	if err != nil {
		return KeptFailure{}, err
	}
	if err := d.validate(f.Consumer, edit.EventID, body); err != nil {
		return KeptFailure{}, err
	}
	action.Action = "edit"
	by := Correction{EventID: edit.EventID, OrderID: event.SubjectOf(body), Payload: body}
	if signature := d.keys.Sign(body); signature != "" {
		by.Metadata = map[string]string{event.SignatureHeader: signature}
	}
	done, err := d.stores[id.Service].ReplaceFailure(ctx, id.Number, by, action)
	return d.acted(ctx, id, action.Action, done, err)
}

// apply returns the new event.
func (e FailureEdit) apply(f KeptFailure, original []byte) ([]byte, error) {
	causation := cmp.Or(event.IDOf(original), f.MessageID, f.ID.String())
	if e.Data == nil {
		return event.Revise(e.Payload, e.EventID, causation, time.Now(), nil)
	}
	var object map[string]json.RawMessage
	if json.Unmarshal(original, &object) != nil {
		return nil, domain.InvalidField("data", "failure_unreadable",
			"the message of failure %s is not a JSON object, so its data cannot be replaced; send the whole event as payload", f.ID)
	}
	return event.Revise(original, e.EventID, causation, time.Now(), e.Data)
}

// acted returns the failure after an action, or why the action was refused.
func (d *FailureDesk) acted(ctx context.Context, id FailureID, action string, done bool, err error) (KeptFailure, error) {
	if err != nil {
		return KeptFailure{}, err
	}
	f, err := d.Get(ctx, id)
	if err == nil && !done {
		err = domain.Errorf(domain.Conflict, "failure_"+f.State, "failure %s is %s: it is not for %s", id, f.State, action)
	}
	return f, err
}

// RetryFailures asks for many retries.
type RetryFailures struct {
	Filter    FailureFilter // of those that are open; its State is not looked at
	Limit     int           // at most MaxRetries, the oldest of each service first
	PerSecond int           // how many come to their consumers in a second
	Batch     string        // a name for retries that stop together when one of the same database fails; empty if they do not
	FailureAction
}

// RetriedFailures is what became of many retries.
type RetriedFailures struct {
	IDs         []FailureID // in the order in which they come to their consumers
	TooLarge    []FailureID // left open because they are larger than MaxRetryPayload
	Unavailable []string    // services whose database is away: nothing was retried there, or it did not say what was
}

// RetryMany sends the messages of open failures to their consumers once more, each database in one transaction.
// Unavailable if every database is away.
func (d *FailureDesk) RetryMany(ctx context.Context, cmd RetryFailures) (RetriedFailures, error) {
	cmd.Filter.State, cmd.Action = FailureOpen, "retry"
	lists, away, err := ask(ctx, d, func(ctx context.Context, _ string, store FailureStore) ([]KeptFailure, error) {
		return store.OldestFailures(ctx, cmd.Filter, cmd.Limit)
	})
	result := RetriedFailures{Unavailable: away}
	if err != nil {
		return result, err
	}
	spacing := time.Second / time.Duration(cmd.PerSecond)
	budget := int64(maxRetryBytes)
	var failed error
	for _, service := range slices.Sorted(maps.Keys(lists)) {
		var numbers []int64
		for _, f := range lists[service] {
			switch {
			case f.PayloadSize > MaxRetryPayload:
				result.TooLarge = append(result.TooLarge, FailureID{service, f.ID.Number})
			case len(result.IDs)+len(numbers) < cmd.Limit && f.PayloadSize <= budget:
				numbers, budget = append(numbers, f.ID.Number), budget-f.PayloadSize
			}
		}
		if len(numbers) == 0 {
			continue
		}
		retried, err := d.stores[service].RetryFailures(ctx, numbers, FailureRetry{
			FailureAction: cmd.FailureAction, Batch: cmd.Batch, Spacing: spacing, Delay: spacing * time.Duration(len(result.IDs)),
		})
		if err != nil { // what was retried in the databases before stays so
			result.Unavailable, failed = append(result.Unavailable, service), err
			continue
		}
		for _, number := range retried {
			result.IDs = append(result.IDs, FailureID{service, number})
		}
	}
	if len(result.IDs) == 0 {
		return result, failed
	}
	return result, nil
}

// RetryPreview is what RetryMany would do.
type RetryPreview struct {
	Matching    int
	Groups      []FailureGroup
	First       []FailureID // of each database, oldest first
	Unavailable []string
}

// Preview returns what RetryMany would do, and changes nothing.
func (d *FailureDesk) Preview(ctx context.Context, filter FailureFilter) (RetryPreview, error) {
	const groups, first = 50, 10
	filter.State = FailureOpen
	parts, away, err := ask(ctx, d, func(ctx context.Context, service string, store FailureStore) (RetryPreview, error) {
		part := RetryPreview{}
		var errs [3]error
		part.Matching, errs[0] = store.CountFailures(ctx, filter)
		part.Groups, errs[1] = store.GroupFailures(ctx, filter, groups)
		oldest, err := store.OldestFailures(ctx, filter, first)
		errs[2] = err
		for i := range part.Groups {
			part.Groups[i].Example.Service = service
		}
		for _, f := range oldest {
			part.First = append(part.First, FailureID{service, f.ID.Number})
		}
		return part, errors.Join(errs[:]...)
	})
	all := RetryPreview{Unavailable: away}
	for _, service := range slices.Sorted(maps.Keys(parts)) {
		all.Matching += parts[service].Matching
		all.Groups = append(all.Groups, parts[service].Groups...)
		all.First = append(all.First, parts[service].First...)
	}
	return all, err
}
